//! Foreign upstreams, `[[balancer.upstreams]]`: servers of the OpenAI API that are none of ours (vLLM, llama.cpp, a cloud), as members of
//! the pools of their models.
//!
//! Each is asked over connections of its own: what nodes are shown, a certificate above all, is never shown to it.

use std::{
    collections::BTreeMap,
    env, fmt, fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use http::{HeaderValue, Uri};
use pingora::connectors::{ConnectorOptions, http::Connector};
use tidegate_common::{
    config::Reader,
    contract::NodeRecord,
    ids::{NodeId, SiteName},
    tls::{self, TlsError},
};

use crate::auth;

/// Where systems keep the certificates that they trust; `SSL_CERT_FILE` goes first.
const SYSTEM_ROOTS: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];
/// Trusts nobody: for upstreams that are not asked over TLS.
const NO_ROOTS: &str = "/dev/null";

/// One checked entry. Without `Debug`: it holds a key.
#[derive(Clone)]
pub(crate) struct UpstreamConfig {
    /// It as a member.
    record: NodeRecord,
    /// For the `Host` header: without the port that the scheme implies.
    authority: String,
    /// The path of the base URL, without a slash at its end.
    base: String,
    health_path: Option<String>,
    health_interval: Duration,
    health_timeout: Duration,
    stall_timeout: Duration,
    /// Its own names of models, by the names here.
    renames: BTreeMap<String, String>,
    /// Marked as sensitive, so that nothing shows it.
    authorization: Option<HeaderValue>,
    roots: PathBuf,
    /// The files that it names.
    files: Vec<PathBuf>,
}

/// One upstream that can be asked.
pub(crate) struct Foreign {
    config: UpstreamConfig,
    pub(crate) connector: Arc<Connector>,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Upstreams(BTreeMap<NodeId, Arc<Foreign>>);

impl Upstreams {
    /// Makes them ready to be asked, with so many idle connections for each. Must be called within the runtime.
    ///
    /// # Errors
    /// When certificates that were good when the configuration was read are not any more.
    pub(crate) fn connect(configs: &[UpstreamConfig], idle_max: usize) -> Result<Self, TlsError> {
        let mut connectors: BTreeMap<&Path, Arc<Connector>> = BTreeMap::new();
        let mut upstreams = BTreeMap::new();
        for config in configs {
            let connector = match connectors.get(config.roots.as_path()) {
                Some(connector) => Arc::clone(connector),
                None => Arc::new(connector(&config.roots, idle_max)?),
            };
            connectors.insert(&config.roots, Arc::clone(&connector));
            let foreign = Foreign { config: config.clone(), connector };
            upstreams.insert(config.record.id.clone(), Arc::new(foreign));
        }
        Ok(Self(upstreams))
    }

    pub(crate) fn get(&self, id: &NodeId) -> Option<&Arc<Foreign>> {
        self.0.get(id)
    }

    /// All of them as members.
    pub(crate) fn records(&self) -> impl Iterator<Item = &NodeRecord> {
        self.0.values().map(|foreign| &foreign.config.record)
    }
}

fn connector(roots: &Path, idle_max: usize) -> Result<Connector, TlsError> {
    // Pingora panics on files it cannot read, so they are read once more just before
    check_roots(roots)?;
    let mut options = ConnectorOptions::new(idle_max);
    options.ca_file = Some(roots.display().to_string());
    Ok(Connector::new(Some(options)))
}

fn check_roots(roots: &Path) -> Result<(), TlsError> {
    if roots == Path::new(NO_ROOTS) { Ok(()) } else { tls::read_roots(roots).map(drop) }
}

impl Foreign {
    pub(crate) fn id(&self) -> &NodeId {
        &self.config.record.id
    }

    /// For the `Host` header.
    pub(crate) fn authority(&self) -> &str {
        &self.config.authority
    }

    /// The full path of one below the base URL.
    pub(crate) fn path(&self, below: &str) -> String {
        format!("{}{below}", self.config.base)
    }

    /// What is asked to know whether it is well: by default its list of models, which llama.cpp, vLLM and clouds have, and which shows
    /// that the key is right.
    pub(crate) fn health_path(&self) -> String {
        self.config.health_path.clone().unwrap_or_else(|| self.path("/models"))
    }

    pub(crate) fn health_interval(&self) -> Duration {
        self.config.health_interval
    }

    pub(crate) fn health_timeout(&self) -> Duration {
        self.config.health_timeout
    }

    /// Silence after which a stream counts as lost. Longer than a node's: nobody else says `: wait`.
    pub(crate) fn stall_timeout(&self) -> Duration {
        self.config.stall_timeout
    }

    /// What it calls this model.
    pub(crate) fn name_of<'a>(&'a self, model: &'a str) -> &'a str {
        self.config.renames.get(model).map_or(model, String::as_str)
    }

    pub(crate) fn authorization(&self) -> Option<&HeaderValue> {
        self.config.authorization.as_ref()
    }
}

impl fmt::Debug for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Foreign").field(self.id()).finish_non_exhaustive()
    }
}

impl UpstreamConfig {
    /// Reads `[[balancer.upstreams]]`. With `insecure`, a key may travel in plain text.
    pub(crate) fn read_all(r: &Reader<'_>, insecure: bool) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        for section in r.sections("upstreams") {
            let Some(config) = Self::read(&section, insecure) else { continue };
            if all.iter().any(|other| other.record.id == config.record.id) {
                section.problem("id", format!("'{}' stands here twice", config.record.id), "choose another name");
            }
            all.push(config);
        }
        all
    }

    /// The files that it names.
    pub(crate) fn files(&self) -> &[PathBuf] {
        &self.files
    }

    fn read(r: &Reader<'_>, insecure: bool) -> Option<Self> {
        for key in ["id", "base_url", "models"].into_iter().filter(|key| !r.has(key)) {
            r.problem(key, "is missing", "every upstream needs id, base_url and models");
        }
        r.choice("kind", &[("openai", ())], ());
        let id: Option<NodeId> = r.parse("id");
        let base = Base::read(r);
        let (models, renames) = read_models(r);
        let (weight, site) = (r.in_range("weight", 1..=1000u32, 1), r.parse::<SiteName>("site"));
        let authorization = read_key(r);
        let ca = r.get::<PathBuf>("ca");
        let health_path = read_path(r);
        let health_interval = r.duration_or("health_interval", Duration::from_secs(5));
        let health_timeout = r.duration_or("health_timeout", Duration::from_secs(5));
        let stall_timeout = r.duration_or("stall_timeout", Duration::from_secs(60));
        let base = base?;
        if authorization.is_some() && !base.is_private() && !insecure {
            let fix = "use https://, or say balancer.insecure = true";
            r.problem("base_url", "the key would travel in plain text", fix);
        }
        let mut record = NodeRecord::new(id?, base.address(), models.first()?.clone());
        record.models = models;
        record.tls = base.tls;
        record.weight = weight;
        record.site = site.unwrap_or(record.site);
        let files = r.get("api_key_file").into_iter().chain(ca.clone()).collect();
        let roots = read_roots(r, base.tls, ca);
        let (authority, base) = (base.authority(), base.path);
        Some(Self {
            record,
            authority,
            base,
            health_path,
            health_interval,
            health_timeout,
            stall_timeout,
            renames,
            authorization,
            roots,
            files,
        })
    }
}

/// A base URL in parts.
#[derive(Debug, PartialEq, Eq)]
struct Base {
    tls: bool,
    /// With brackets when it is an address of IPv6.
    host: String,
    port: Option<u16>,
    path: String,
}

impl Base {
    fn read(r: &Reader<'_>) -> Option<Self> {
        let text = r.get::<String>("base_url")?;
        let base = Self::parse(&text);
        if base.is_none() {
            let fix = "write it as OpenAI's clients take it, such as \"http://127.0.0.1:8000/v1\"";
            r.problem("base_url", format!("'{text}' is not an http or https URL without query and user"), fix);
        }
        base
    }

    fn parse(text: &str) -> Option<Self> {
        let uri: Uri = text.parse().ok()?;
        let authority = uri.authority().filter(|authority| !authority.as_str().contains('@'))?;
        let tls = match uri.scheme_str()? {
            "http" => false,
            "https" => true,
            _ => return None,
        };
        let path = uri.path().trim_end_matches('/').to_owned();
        let has_host = !authority.host().is_empty() && uri.query().is_none();
        has_host.then(|| Self { tls, host: authority.host().to_owned(), port: authority.port_u16(), path })
    }

    fn address(&self) -> String {
        let port = self.port.unwrap_or(if self.tls { 443 } else { 80 });
        format!("{}:{port}", self.host)
    }

    fn authority(&self) -> String {
        match self.port {
            Some(port) => format!("{}:{port}", self.host),
            None => self.host.clone(),
        }
    }

    /// Whether nobody on the way can read along.
    fn is_private(&self) -> bool {
        let host = self.host.trim_matches(['[', ']']);
        self.tls || host == "localhost" || host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
    }
}

/// Names here, and those that are others there: `"small=org/small-chat"`.
fn read_models(r: &Reader<'_>) -> (Vec<String>, BTreeMap<String, String>) {
    let (mut models, mut renames) = (Vec::new(), BTreeMap::new());
    for (i, entry) in r.get_or::<Vec<String>>("models", Vec::new()).iter().enumerate() {
        let (name, theirs) = entry.split_once('=').map_or((entry.trim(), None), |(a, b)| (a.trim(), Some(b.trim())));
        if name.is_empty() || theirs == Some("") {
            let fix = "give the model's name, or \"name here=name there\"";
            r.problem(&format!("models[{i}]"), format!("'{entry}' names no model"), fix);
            continue;
        }
        models.push(name.to_owned());
        renames.extend(theirs.map(|theirs| (name.to_owned(), theirs.to_owned())));
    }
    if models.is_empty() && r.has("models") {
        r.problem("models", "names no model", "list what requests may ask for there");
    }
    (models, renames)
}

fn read_path(r: &Reader<'_>) -> Option<String> {
    let path = r.get::<String>("health_path")?;
    if !path.starts_with('/') || path.parse::<Uri>().is_err() {
        r.problem("health_path", format!("'{path}' is not a path"), "give the whole path, such as \"/health\"");
    }
    Some(path)
}

fn read_key(r: &Reader<'_>) -> Option<HeaderValue> {
    let path = r.get::<PathBuf>("api_key_file")?;
    auth::check_mode(r, "api_key_file", &path);
    let key = fs::read_to_string(&path).map_err(|e| {
        r.problem("api_key_file", format!("{}: {e}", path.display()), "give a readable file that holds the key alone");
    });
    let value = HeaderValue::from_str(&format!("Bearer {}", key.ok()?.trim()));
    match value {
        Ok(mut value) if value.len() > "Bearer ".len() => {
            value.set_sensitive(true);
            Some(value)
        }
        _ => {
            let message = format!("{} holds no key", path.display());
            r.problem("api_key_file", message, "put the key there, on one line, and nothing else");
            None
        }
    }
}

/// The certificates to verify it by: its own `ca`, or the system's.
fn read_roots(r: &Reader<'_>, tls: bool, ca: Option<PathBuf>) -> PathBuf {
    if !tls {
        if ca.is_some() {
            r.problem("ca", "is of no use without TLS", "write https:// in base_url, or remove it");
        }
        return NO_ROOTS.into();
    }
    let Some(roots) = ca.or_else(system_roots) else {
        r.problem("ca", "this system has no list of certificates that it trusts", "name a PEM file to verify it by");
        return NO_ROOTS.into();
    };
    if let Err(e) = check_roots(&roots) {
        r.problem("ca", e.to_string(), "name a PEM file to verify it by");
    }
    roots
}

fn system_roots() -> Option<PathBuf> {
    let said = env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty()).map(PathBuf::from);
    said.or_else(|| SYSTEM_ROOTS.iter().map(PathBuf::from).find(|path| path.is_file()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use tidegate_common::config::{Problems, Raw};

    use super::*;

    fn read(text: &str) -> Result<Vec<UpstreamConfig>, Problems> {
        tls::install_provider();
        Raw::from_toml(text, "t").unwrap().check(|r| UpstreamConfig::read_all(r, false))
    }

    #[test]
    fn a_base_url_is_read_as_openais_clients_take_it() {
        let base = |tls, host: &str, port, path: &str| Some(Base { tls, host: host.into(), port, path: path.into() });
        assert_eq!(Base::parse("http://127.0.0.1:8000/v1/"), base(false, "127.0.0.1", Some(8000), "/v1"));
        assert_eq!(Base::parse("https://api.example.com"), base(true, "api.example.com", None, ""));
        assert_eq!(Base::parse("http://[::1]:80/a/b"), base(false, "[::1]", Some(80), "/a/b"));
        for wrong in ["", "8000", "/v1", "ftp://a/", "http://", "http://u:p@a/v1", "http://a/v1?key=x", "//a/v1"] {
            assert_eq!(Base::parse(wrong), None, "{wrong}");
        }
        let https = Base::parse("https://api.example.com/v1").unwrap();
        assert_eq!((https.address(), https.authority()), ("api.example.com:443".into(), "api.example.com".into()));
        assert!(https.is_private() && Base::parse("http://[::1]/").unwrap().is_private());
        assert!(!Base::parse("http://10.0.0.1/").unwrap().is_private());
    }

    #[test]
    fn an_entry_of_few_words_gets_defaults() {
        let entry = "[[upstreams]]\nid = \"v\"\nbase_url = \"http://a:8000/v1\"\nmodels = [\"m\", \"small = org/s\"]";
        let upstreams = Upstreams::connect(&read(entry).unwrap(), 1).unwrap();
        let foreign = upstreams.get(&"v".parse().unwrap()).unwrap();
        assert_eq!((foreign.name_of("m"), foreign.name_of("small")), ("m", "org/s"));
        assert_eq!((foreign.health_path(), foreign.path("/chat")), ("/v1/models".into(), "/v1/chat".into()));
        assert_eq!(upstreams.records().next().unwrap().models(), ["m", "small"]);
    }

    #[test]
    fn every_fault_is_found_in_one_run() {
        let folder = tempfile::tempdir().unwrap();
        let (key, empty) = (folder.path().join("key"), folder.path().join("empty"));
        fs::write(&key, "sk-1\n").unwrap();
        fs::write(&empty, "\n").unwrap();
        for file in [&key, &empty] {
            fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
        }
        let text = format!(
            "[[upstreams]]\nid = \"a b\"\nkind = \"grpc\"\nbase_url = \"a\"\nmodels = [\"=x\"]\nhealth_path = \"health\"\n\
             [[upstreams]]\nid = \"v\"\nbase_url = \"http://10.0.0.1/v1\"\nmodels = [\"m\"]\napi_key_file = {key:?}\nca = \"/no\"\n\
             [[upstreams]]\nid = \"v\"\nbase_url = \"https://a\"\nmodels = [\"m\"]\napi_key_file = {empty:?}\nca = \"/no\"\n\
             [[upstreams]]\n"
        );
        let problems = read(&text).err().unwrap().0;
        let mut paths: Vec<&str> = problems.iter().map(|p| p.path.strip_prefix("upstreams").unwrap()).collect();
        paths.sort_unstable();
        let expected = [
            "[0].base_url",
            "[0].health_path",
            "[0].id",
            "[0].kind",
            "[0].models",
            "[0].models[0]",
            "[1].base_url",
            "[1].ca",
            "[2].api_key_file",
            "[2].ca",
            "[2].id",
            "[3].base_url",
            "[3].id",
            "[3].models",
        ];
        assert_eq!(paths, expected);
        assert!(!format!("{problems:?}").contains("sk-1"));
    }
}
