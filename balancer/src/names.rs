//! Which certificate a client gets: that of the name it asks for (SNI, RFC 6066), else the first.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tidegate_common::{
    config::{Reader, read_pair},
    tls::{Identity, TlsError},
};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

use crate::auth::UnixSeconds;

/// The edge's certificates, the one for clients that name no host first.
#[derive(Debug)]
pub(crate) struct Certificates(Vec<Certificate>);

/// A certificate with its key, as rustls takes it.
#[derive(Debug)]
struct Certificate {
    /// Hosts, in lower case; one may begin with `*.`.
    names: Vec<String>,
    /// Last second that it is good.
    not_after: UnixSeconds,
    path: PathBuf,
    /// Its other files.
    beside: Vec<PathBuf>,
    key: Arc<CertifiedKey>,
}

impl Certificates {
    /// Reads `cert`, `key` and `ocsp` of `[balancer.tls]`, and of each `[[balancer.tls.certificates]]`. None when there is not one.
    pub(crate) fn read(r: &Reader<'_>) -> Option<Self> {
        let first = Certificate::read(r);
        let more = r.sections("certificates");
        let more: Vec<_> = more.iter().map(Certificate::read).collect();
        if r.is_present() && !r.has("cert") && !r.has("key") {
            r.problem("cert", "is missing", "set cert and key, or remove the section");
        }
        first.map(|first| Self(std::iter::once(first).chain(more.into_iter().flatten()).collect()))
    }

    /// Each file of a certificate with the last second that it is good.
    pub(crate) fn ends(&self) -> impl Iterator<Item = (&Path, UnixSeconds)> {
        self.0.iter().map(|certificate| (certificate.path.as_path(), certificate.not_after))
    }

    /// Every file that they were read from.
    pub(crate) fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.0.iter().flat_map(|certificate| std::iter::once(&certificate.path).chain(&certificate.beside))
    }

    fn find(&self, host: Option<&str>) -> &Certificate {
        let host = host.unwrap_or_default().to_ascii_lowercase();
        let exactly = |c: &&Certificate| c.names.contains(&host);
        let by_star = |c: &&Certificate| {
            let parent = host.split_once('.').map(|(_, parent)| parent);
            c.names.iter().any(|name| name.strip_prefix("*.").is_some_and(|name| Some(name) == parent))
        };
        self.0.iter().find(exactly).or_else(|| self.0.iter().find(by_star)).unwrap_or(&self.0[0])
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.find(hello.server_name()).key))
    }
}

impl Certificate {
    fn read(r: &Reader<'_>) -> Option<Self> {
        let ocsp = r.get::<PathBuf>("ocsp");
        let (cert, key) = read_pair(r, "cert", "key")?;
        let fix = "give PEM files of a certificate and its key";
        match Self::load(&cert, &key) {
            Ok((mut this, mut certified)) => {
                this.beside.extend(ocsp.clone());
                certified.ocsp = ocsp.and_then(|path| {
                    let fail =
                        |e| r.problem("ocsp", format!("{}: {e}", path.display()), "save the response in DER form");
                    std::fs::read(&path).map_err(fail).ok()
                });
                this.key = Arc::new(certified);
                Some(this)
            }
            Err(e) => {
                r.problem("cert", e.to_string(), fix);
                None
            }
        }
    }

    fn load(cert: &Path, key: &Path) -> Result<(Self, CertifiedKey), TlsError> {
        let certified = Identity::read(cert, key)?.certified()?;
        let leaf = certified.cert.first().map(|leaf| leaf.as_ref()).unwrap_or_default();
        let (_, parsed) = X509Certificate::from_der(leaf).map_err(|e| TlsError::Pem {
            path: cert.to_owned(),
            what: "certificate",
            reason: e.to_string(),
        })?;
        let alternative = parsed.subject_alternative_name().ok().flatten();
        let names = alternative.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
            _ => None,
        });
        let not_after = UnixSeconds(u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or_default());
        let this = Self {
            names: names.collect(),
            not_after,
            path: cert.to_owned(),
            beside: vec![key.to_owned()],
            key: Arc::new(certified.clone()),
        };
        Ok((this, certified))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificates(dir: &Path, hosts: &[&[&str]]) -> Certificates {
        tidegate_common::tls::install_provider();
        let load = |(i, names): (usize, &&[&str])| {
            let key = rcgen::KeyPair::generate().unwrap();
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            let mut params = rcgen::CertificateParams::new(names).unwrap();
            params.not_after = rcgen::date_time_ymd(2030, 1, 1);
            let (cert, secret) = (dir.join(format!("{i}.pem")), dir.join(format!("{i}.key")));
            std::fs::write(&cert, params.self_signed(&key).unwrap().pem()).unwrap();
            std::fs::write(&secret, key.serialize_pem()).unwrap();
            Certificate::load(&cert, &secret).unwrap().0
        };
        Certificates(hosts.iter().enumerate().map(load).collect())
    }

    #[test]
    fn the_name_asked_for_decides_and_a_star_stands_for_one_label() {
        let dir = tempfile::tempdir().unwrap();
        let all = certificates(dir.path(), &[&["a.example"], &["*.example.net"], &["api.example.net", "b.example"]]);
        let which = |host| all.0.iter().position(|c| std::ptr::eq(c, all.find(host))).unwrap();
        for (host, expected) in [
            (None, 0),
            (Some("nobody.example"), 0),
            (Some("x.example.net"), 1),
            (Some("x.y.example.net"), 0),
            (Some("api.example.net"), 2),
            (Some("B.Example"), 2),
        ] {
            assert_eq!(which(host), expected, "{host:?}");
        }
        assert!(all.ends().all(|(_, end)| end == UnixSeconds(1_893_456_000)));
    }
}
