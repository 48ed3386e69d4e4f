//! One meaning of each request. Where HTTP lets a message be read in more than one way, somebody will have two servers read it differently
//! (request smuggling), so what is not plain is refused and its connection closed, before anything is decided by it.
//!
//! The parser refuses much by itself: folded lines, spaces before a colon, control characters. Judged here, on the bytes as they came, is
//! what it would mend or overlook. Then the target gets its normal form, so that every later stage knows each path by one name.

use std::borrow::Cow;

use http::{
    Method, Uri,
    header::{HOST, TRANSFER_ENCODING},
    uri::Authority,
};
use pingora::{http::RequestHeader, protocols::http::ServerSession};
use tidegate_common::contract::{ApiError, ErrorKind};

/// Judges a request's head, and gives its target the normal form. The connection of what is refused ends with the refusal.
pub(crate) fn judge(session: &mut ServerSession) -> Result<(), ApiError> {
    let judged = check(session);
    if judged.is_err() {
        session.set_keepalive(None);
    }
    judged
}

fn check(session: &mut ServerSession) -> Result<(), ApiError> {
    if let Some(h1) = session.as_http1() {
        // h2 has lengths of its own and no lines
        check_lines(&h1.get_headers_raw_bytes())?;
    }
    if session.get_header(TRANSFER_ENCODING).is_some() {
        // the parser is lenient with extensions of chunks, so nothing behind them may be read as another request
        session.set_keepalive(None);
    }
    let head = session.req_header_mut();
    check_method(&head.method)?;
    check_host(head)?;
    let target = normal_target(head)?;
    if let Some(target) = target {
        head.set_uri(target);
    }
    Ok(())
}

fn malformed(what: &str) -> ApiError {
    ApiError::new(ErrorKind::InvalidRequest, "malformed_request", format!("the request's head is malformed: {what}"))
}

fn ambiguous(what: &str) -> ApiError {
    ApiError::new(ErrorKind::InvalidRequest, "ambiguous_framing", what)
}

/// What decides where a body ends and whom it is for may stand once, in one form.
#[derive(Debug, Default)]
struct Seen {
    hosts: usize,
    lengths: usize,
    encodings: usize,
}

/// Judges the head's lines as they came (RFC 9112, sections 2.2, 3.2 and 6).
fn check_lines(raw: &[u8]) -> Result<(), ApiError> {
    if raw.iter().enumerate().any(|(at, byte)| *byte == b'\n' && (at == 0 || raw[at - 1] != b'\r')) {
        return Err(malformed("a line ends without a carriage return"));
    }
    let mut lines = raw.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii_end).filter(|line| !line.is_empty());
    let demands_host = lines.next().is_some_and(|line| line.ends_with(b"HTTP/1.1"));
    let mut seen = Seen::default();
    for line in lines {
        seen.take(line)?;
    }
    if seen.hosts > 1 || (demands_host && seen.hosts == 0) {
        return Err(malformed("it must have one host"));
    }
    if seen.lengths + seen.encodings > 1 {
        return Err(ambiguous("content-length and transfer-encoding may stand once, and not together"));
    }
    Ok(())
}

impl Seen {
    fn take(&mut self, line: &[u8]) -> Result<(), ApiError> {
        let colon = memchr::memchr(b':', line).ok_or_else(|| malformed("a line without a colon"))?;
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.eq_ignore_ascii_case(b"host") {
            self.hosts += 1;
        } else if name.eq_ignore_ascii_case(b"content-length") {
            self.lengths += 1;
            if value.is_empty() || value.len() > 18 || !value.iter().all(u8::is_ascii_digit) {
                return Err(ambiguous("content-length must be one number"));
            }
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            self.encodings += 1;
            if !value.eq_ignore_ascii_case(b"chunked") {
                return Err(ambiguous("no transfer-encoding but 'chunked' is known here"));
            }
        }
        Ok(())
    }
}

/// Methods that are about the connection or echo what came are nothing for an API.
fn check_method(method: &Method) -> Result<(), ApiError> {
    match *method {
        Method::CONNECT | Method::TRACE => {
            let message = format!("{method} is not taken here");
            Err(ApiError::new(ErrorKind::MethodNotAllowed, "method_not_allowed", message))
        }
        _ => Ok(()),
    }
}

/// A host that is there must be one (RFC 9110, section 7.2).
fn check_host(head: &RequestHeader) -> Result<(), ApiError> {
    let is_one = |value: &[u8]| Authority::try_from(value).is_ok_and(|host| !host.host().is_empty());
    match head.headers.get(HOST) {
        Some(host) if !is_one(host.as_bytes()) => Err(malformed("its host is none")),
        _ => Ok(()),
    }
}

/// The target in its normal form, where it has another one.
fn normal_target(head: &RequestHeader) -> Result<Option<Uri>, ApiError> {
    if !has_known_form(head.raw_path()) {
        return Err(malformed("its target is neither a path nor an http URL"));
    }
    let path = normal_path(head.uri.path()).ok_or_else(|| malformed("its path has no normal form"))?;
    let Cow::Owned(path) = path else { return Ok(None) };
    let target = match head.uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path,
    };
    target.parse().map(Some).map_err(|_| malformed("its path has no normal form"))
}

/// A path, or a URL as for a proxy, which every server must take (RFC 9112, section 3.2.2). Pingora has compared its host.
fn has_known_form(target: &[u8]) -> bool {
    let starts = |with: &[u8]| target.get(..with.len()).is_some_and(|start| start.eq_ignore_ascii_case(with));
    target.starts_with(b"/") || ((starts(b"http://") || starts(b"https://")) && !target.contains(&b'#'))
}

/// The one name of a path: what is encoded without need is decoded (RFC 3986, section 6.2.2), dots are followed, slashes are single. Case
/// and a last slash are left as they are, since they make another path. None for what could be read in two ways further on: an encoded
/// slash or control character, a backslash, a path that climbs above its root.
fn normal_path(path: &str) -> Option<Cow<'_, str>> {
    if path.contains('\\') {
        return None;
    }
    let is_normal = !path.contains('%') && !path.contains("//") && !path.contains("/.");
    if is_normal {
        return Some(Cow::Borrowed(path));
    }
    let decoded = decoded(path)?;
    let mut segments: Vec<&str> = Vec::new();
    for segment in decoded.split('/') {
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()?),
            segment => segments.push(segment),
        }
    }
    let is_folder = !segments.is_empty() && ["/", "/.", "/.."].iter().any(|end| decoded.ends_with(end));
    Some(Cow::Owned(format!("/{}{}", segments.join("/"), if is_folder { "/" } else { "" })))
}

/// Decodes what need not be encoded; all other codes stay, in capitals.
fn decoded(path: &str) -> Option<String> {
    let mut out = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        let digit = |at: usize| rest.as_bytes().get(at).and_then(|digit| char::from(*digit).to_digit(16));
        let byte = (digit(at + 1)? * 16 + digit(at + 2)?) as u8;
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(byte.into()),
            b'/' | b'\\' | 0..=0x1f | 0x7f => return None,
            _ => out.push_str(&format!("%{byte:02X}")),
        }
        rest = &rest[at + 3..];
    }
    out.push_str(rest);
    Some(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn code(head: &str) -> Option<&'static str> {
        check_lines(head.as_bytes()).err().map(|error| error.code)
    }

    #[test]
    fn what_frames_a_body_stands_once() {
        let with = |lines: &str| code(&format!("POST / HTTP/1.1\r\nhost: x\r\n{lines}\r\n"));
        for good in ["", "content-length: 3\r\n", "Transfer-Encoding: Chunked\r\n", "x-content-length: y\r\n"] {
            assert_eq!(with(good), None, "{good}");
        }
        for bad in [
            "content-length: 3\r\ncontent-length: 3\r\n",
            "content-length: 3, 3\r\n",
            "content-length: +3\r\n",
            "content-length: \r\n",
            "content-length: 99999999999999999999\r\n",
            "content-length: 0x3\r\n",
            "CONTENT-length: 3\r\ntransfer-encoding: chunked\r\n",
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
            "transfer-encoding: gzip, chunked\r\n",
            "transfer-encoding: chunked, identity\r\n",
            "transfer-encoding: \x0bchunked\r\n",
        ] {
            assert_eq!(with(bad), Some("ambiguous_framing"), "{bad}");
        }
    }

    #[test]
    fn lines_end_as_they_must_and_a_host_is_named_once() {
        for bad in [
            "GET / HTTP/1.1\nhost: x\r\n\r\n",
            "GET / HTTP/1.1\r\nhost: x\n\r\n",
            "GET / HTTP/1.1\r\nhost: x\r\n\n",
            "\nGET / HTTP/1.1\r\nhost: x\r\n\r\n",
            "GET / HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\r\nhost: x\r\nHost: x\r\n\r\n",
            "GET / HTTP/1.0\r\nhost: x\r\nHost: x\r\n\r\n",
        ] {
            assert_eq!(code(bad), Some("malformed_request"), "{bad:?}");
        }
        assert_eq!(code("GET / HTTP/1.0\r\n\r\n"), None);
        assert_eq!(code("\r\nGET / HTTP/1.1\r\nhost: x\r\n\r\n"), None);
    }

    #[test]
    fn each_path_has_one_name() {
        for (path, normal) in [
            ("/v1/models", "/v1/models"),
            ("/v1//models", "/v1/models"),
            ("//v1/models", "/v1/models"),
            ("/v1/%6dodels", "/v1/models"),
            ("/v1/./models", "/v1/models"),
            ("/v1/x/../models", "/v1/models"),
            ("/v1/%2e%2E/metrics", "/metrics"),
            ("/v1/models/", "/v1/models/"),
            ("/v1//models//", "/v1/models/"),
            ("/v1/models/.", "/v1/models/"),
            ("/V1/models", "/V1/models"),
            ("/a%20b%c3", "/a%20b%C3"),
            ("/", "/"),
            ("//", "/"),
        ] {
            assert_eq!(normal_path(path).as_deref(), Some(normal), "{path}");
        }
        for none in [
            "/..",
            "/a/../..",
            "/a%2fb",
            "/a%5Cb",
            "/a\\b",
            "/a%00",
            "/a%0d%0aHost:x",
            "/a%",
            "/a%2",
            "/a%zz",
            "/a%+5",
            "/%é",
        ] {
            assert_eq!(normal_path(none), None, "{none}");
        }
    }

    #[test]
    fn targets_are_paths_or_urls() {
        for good in ["/", "/x", "http://h/x", "HTTPS://h"] {
            assert!(has_known_form(good.as_bytes()), "{good}");
        }
        for bad in ["", "*", "x", "ftp://h/x", "h:80", "http:/x", "http://h/#x"] {
            assert!(!has_known_form(bad.as_bytes()), "{bad}");
        }
    }

    proptest! {
        /// Law: a normal form is its own, and has nothing left that means something else.
        #[test]
        fn the_normal_form_is_stable(path in "/[a-z./%2e5c]{0,30}") {
            if let Some(normal) = normal_path(&path) {
                prop_assert!(normal.starts_with('/') && !normal.contains("//"));
                prop_assert!(!normal.split('/').any(|segment| segment == "." || segment == ".."));
                prop_assert_eq!(normal_path(&normal), Some(Cow::Borrowed(&*normal)), "{}", path);
            }
        }

        #[test]
        fn any_bytes_are_judged_without_panic(raw: Vec<u8>, path: String) {
            let _ = check_lines(&raw);
            let _ = normal_path(&path);
        }
    }
}
