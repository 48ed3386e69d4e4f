//! `[balancer]`: read once, checked completely, files included, so that `tidegate check` finds what `run` would.
//!
//! A `BalancerConfig` that came out of a run without problems is right; nothing downstream checks again.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use bytesize::ByteSize;
use rustls::ServerConfig;
use tidegate_common::{
    config::{Reader, read_pair},
    tls::{self, Clients, Identity, MinVersion},
};

use crate::{
    accept::Allowlist,
    audit::AuditConfig,
    auth::{Auth, UnixSeconds},
    cache::CacheConfig,
    limits::{DoorsConfig, Quotas},
    names::Certificates,
    policy::{self, Decision, Policies, Who},
    pool::Rules,
    proxied::{Listener, Trusted},
    remembered::MembersFile,
    sessions::SessionsConfig,
    upgrade::UpgradeSocket,
    upstreams::UpstreamConfig,
};

/// Where the edge listens when nothing is said.
const LISTEN: &str = "127.0.0.1:18789";
/// Where the private listener stands when nothing is said.
const ADMIN_LISTEN: &str = "127.0.0.1:18790";

/// The checked `[balancer]` section.
#[derive(Clone)]
pub struct BalancerConfig {
    pub(crate) listen: Vec<SocketAddr>,
    pub(crate) admin: SocketAddr,
    pub(crate) threads: usize,
    pub(crate) allowlist: Allowlist,
    pub(crate) trusted: Trusted,
    pub(crate) listeners: Vec<Listener>,
    pub(crate) drain_grace: Duration,
    pub(crate) tls: Option<EdgeTls>,
    pub(crate) auth: Option<Arc<Auth>>,
    pub(crate) policies: Arc<Policies>,
    pub(crate) cache: Option<CacheConfig>,
    pub(crate) sessions: SessionsConfig,
    pub(crate) limits: LimitsConfig,
    pub(crate) health: HealthConfig,
    pub(crate) relay: RelayConfig,
    pub(crate) upstream_tls: Option<UpstreamTls>,
    pub(crate) members_file: MembersFile,
    pub(crate) upgrade_socket: UpgradeSocket,
    pub(crate) audit: Option<AuditConfig>,
    pub(crate) access_log: bool,
    files: Vec<PathBuf>,
    pub(crate) upstreams: Vec<UpstreamConfig>,
}

/// `[balancer.limits]`: every bound of what a client may make the edge hold.
#[derive(Debug, Clone)]
pub(crate) struct LimitsConfig {
    /// Largest request body.
    pub(crate) body_bytes_max: usize,
    /// Most header lines.
    pub(crate) headers_max: usize,
    /// Largest request head.
    pub(crate) header_bytes_max: usize,
    /// Requests in flight at once.
    pub(crate) concurrent_requests_max: usize,
    /// From a connection's start to the end of TLS, and again to the end of the first head.
    pub(crate) header_timeout: Duration,
    /// From the end of a head to the end of its body.
    pub(crate) body_timeout: Duration,
    /// How long a kept-alive connection may stay silent.
    pub(crate) idle_timeout: Duration,
    /// From a piece of an answer to the next that the client takes.
    pub(crate) write_timeout: Duration,
    /// Who may come, and how often.
    pub(crate) doors: DoorsConfig,
    /// Connections from one address at once.
    pub(crate) connections_per_address_max: usize,
    /// How much each may have.
    pub(crate) quotas: Quotas,
}

/// `[balancer.health]`.
#[derive(Debug, Clone)]
pub(crate) struct HealthConfig {
    /// Between two probes of a member that is well.
    pub(crate) interval: Duration,
    /// Bound of one probe.
    pub(crate) timeout: Duration,
    /// What decides about members.
    pub(crate) rules: Rules,
}

/// `[balancer.relay]`.
#[derive(Debug, Clone)]
pub(crate) struct RelayConfig {
    /// Bound of one connection to a node.
    pub(crate) connect_timeout: Duration,
    /// Silence after which a node counts as lost.
    pub(crate) stall_timeout: Duration,
    /// How often one stream may change its node after it has begun.
    pub(crate) resumes_max: u32,
    /// How long a request or stream that no node can serve now waits for one that can.
    pub(crate) queue_wait: Duration,
    /// Moves from node to node a second, over all requests.
    pub(crate) moves_per_second: u32,
    /// How many moves may come at once after a pause.
    pub(crate) moves_burst: u32,
    /// Bound of a whole request.
    pub(crate) request_timeout: Duration,
}

/// `[balancer.upstream_tls]`: how nodes are verified, and what the edge shows to them.
#[derive(Debug, Clone)]
pub(crate) struct UpstreamTls {
    pub(crate) ca: PathBuf,
    pub(crate) identity: Option<(PathBuf, PathBuf)>,
}

/// `[balancer.tls]`.
#[derive(Clone)]
pub(crate) struct EdgeTls {
    pub(crate) config: Arc<ServerConfig>,
    pub(crate) certificates: Arc<Certificates>,
    /// Whether clients may show certificates of their own.
    pub(crate) takes_certificates: bool,
}

impl BalancerConfig {
    /// Sections and keys that hold from a start to the end; all others a reload may change.
    pub const FIXED: [&str; 10] = [
        "cluster",
        "log",
        "telemetry",
        "balancer.listen",
        "balancer.admin",
        "balancer.audit",
        "balancer.threads",
        "balancer.members_file",
        "balancer.upgrade_socket",
        "balancer.limits.idle_timeout",
    ];

    /// Reads `[balancer]`; every problem is noted at `root`, also those of the files it names.
    pub fn read(root: &Reader<'_>) -> Self {
        tls::install_provider();
        let r = root.section("balancer");
        let insecure = r.get_or("insecure", false);
        let (tls, auth, upstream_tls) = (r.section("tls"), r.section("auth"), r.section("upstream_tls"));
        let upstreams = UpstreamConfig::read_all(&r, insecure);
        let edge_tls = read_tls(&tls);
        let takes_certificates = edge_tls.as_ref().is_some_and(|tls| tls.takes_certificates);
        let known = Auth::read(&auth, takes_certificates);
        let audit = AuditConfig::read(&r.section("audit"));
        let listen = read_listen(&r);
        let config = Self {
            trusted: Trusted::read(&r),
            listeners: Listener::read_all(&r, &listen),
            listen,
            admin: read_admin(&r.section("admin"), insecure),
            threads: r.in_range("threads", 1..=1024, available_threads()),
            allowlist: Allowlist::read(&r),
            drain_grace: r.duration_or("drain_grace", Duration::from_secs(30)),
            limits: LimitsConfig::read(&r.section("limits")),
            health: HealthConfig::read(&r.section("health")),
            relay: RelayConfig::read(&r.section("relay")),
            upstream_tls: UpstreamTls::read(&upstream_tls),
            members_file: MembersFile::read(&r),
            upgrade_socket: UpgradeSocket::read(&r),
            files: named_files(
                &tls,
                edge_tls.as_ref().map(|tls| &*tls.certificates),
                known.as_ref(),
                &upstream_tls,
                &upstreams,
            ),
            policies: Arc::new(Policies::read(&r)),
            cache: CacheConfig::read(&r.section("cache")),
            sessions: SessionsConfig::read(&r.section("sessions")),
            auth: known.map(Arc::new),
            tls: edge_tls,
            access_log: r.get_or("access_log", true),
            audit,
            upstreams,
        };
        if !insecure {
            config.demand_protection(&r);
        }
        config
    }

    /// Where clients are served.
    pub fn listen_addresses(&self) -> &[SocketAddr] {
        &self.listen
    }

    /// Where the private listener stands.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin
    }

    /// Certificates, keys and key files that it names: what a change of means reading all of it again.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Where and how the audit log is written, if it is.
    pub fn audit(&self) -> Option<&AuditConfig> {
        self.audit.as_ref()
    }

    /// Whether clients are served over TLS.
    pub fn uses_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Whether a client with this address may connect to the listener at `local`, as far as that is known.
    pub(crate) fn permits(&self, local: Option<SocketAddr>, ip: IpAddr) -> bool {
        let listener = local.and_then(|local| self.listeners.iter().find(|listener| listener.is_at(local)));
        self.allowlist.permits(ip) && listener.is_none_or(|listener| listener.permits(ip))
    }

    /// What would become of a request, and why: by its address first, then by what its key allows, then by the policies.
    pub fn decide(&self, mut who: Who, action: &str, resource: &str) -> Decision {
        if who.address.is_some_and(|address| !self.allowlist.permits(address)) {
            return Decision::Refused("its address may not connect (balancer.allow, balancer.deny)".into());
        }
        let key = who.names.iter().find_map(|name| name.strip_prefix("key:"));
        let principal = key.zip(self.auth.as_ref()).map(|(id, auth)| auth.key(id, UnixSeconds::now()));
        match principal.transpose() {
            Err(error) => return Decision::Refused(error.message),
            Ok(Some(principal)) => {
                let model = resource.strip_prefix("model:").map_or(Ok(()), |model| principal.demand_model(model));
                if let Err(error) = principal.demand(policy::scope(action)).and(model) {
                    return Decision::Refused(error.message);
                }
                who.names.extend(Who::new(Some(&principal), None).names);
            }
            Ok(None) => {}
        }
        self.policies.decide(&who, action, resource)
    }

    /// Goes on with what the configuration `before` this one has fetched.
    pub(crate) fn inherit(&mut self, before: &Self) {
        let mine = self.auth.as_mut().and_then(Arc::get_mut);
        if let (Some(mine), Some(before)) = (mine, &before.auth) {
            mine.inherit(before);
        }
    }

    fn demand_protection(&self, r: &Reader<'_>) {
        for (i, address) in self.listen.iter().enumerate().filter(|(_, a)| !a.ip().is_loopback()) {
            let path = format!("listen[{i}]");
            if !r.has("tls") {
                let fix = "set balancer.tls.cert and balancer.tls.key, listen on 127.0.0.1, or say insecure = true";
                r.problem(&path, format!("{address} can be reached from elsewhere, and there is no TLS"), fix);
            }
            if !r.has("auth") {
                let fix = "set balancer.auth.keys_file, listen on 127.0.0.1, or say insecure = true";
                r.problem(&path, format!("{address} can be reached from elsewhere, and no key is asked for"), fix);
            }
        }
    }
}

impl fmt::Debug for BalancerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BalancerConfig")
            .field("listen", &self.listen)
            .field("admin", &self.admin)
            .field("tls", &self.uses_tls())
            .finish_non_exhaustive()
    }
}

/// The sections are those that were read: a reader of its own would not know their other keys.
fn named_files(
    tls: &Reader<'_>,
    certificates: Option<&Certificates>,
    auth: Option<&Auth>,
    upstream_tls: &Reader<'_>,
    upstreams: &[UpstreamConfig],
) -> Vec<PathBuf> {
    let sections: [(&Reader<'_>, &[&str]); 2] = [(tls, &["client_ca"]), (upstream_tls, &["ca", "cert", "key"])];
    let named = sections.into_iter().flat_map(|(section, keys)| keys.iter().filter_map(|key| section.get(key)));
    let named = named.chain(tls.get::<Vec<String>>("client_crl").unwrap_or_default().into_iter().map(PathBuf::from));
    let named = named.chain(certificates.into_iter().flat_map(|all| all.files().cloned()));
    let named = named.chain(auth.into_iter().flat_map(Auth::files).cloned());
    named.chain(upstreams.iter().flat_map(UpstreamConfig::files).cloned()).collect()
}

fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("a constant address is well formed")
}

fn read_listen(r: &Reader<'_>) -> Vec<SocketAddr> {
    let addresses = r.parse_list("listen").unwrap_or_else(|| vec![address(LISTEN)]);
    if addresses.is_empty() {
        r.problem("listen", "no address to listen on", format!("give at least one, such as \"{LISTEN}\""));
    }
    addresses
}

fn read_admin(r: &Reader<'_>, insecure: bool) -> SocketAddr {
    let admin: SocketAddr = r.parse("listen").unwrap_or_else(|| address(ADMIN_LISTEN));
    if !admin.ip().is_loopback() && !insecure {
        let message =
            format!("{admin} can be reached from elsewhere, and the private listener has neither TLS nor keys");
        r.problem("listen", message, "listen on 127.0.0.1, or say balancer.insecure = true");
    }
    admin
}

fn read_tls(r: &Reader<'_>) -> Option<EdgeTls> {
    let min = r.choice("min_version", &[("1.3", MinVersion::Tls13), ("1.2", MinVersion::Tls12)], MinVersion::Tls13);
    let clients = read_clients(r);
    let certificates = Arc::new(Certificates::read(r)?);
    let config = tls::server_config(Arc::clone(&certificates) as _, min, clients.as_ref());
    let fail = |e: tls::TlsError| {
        r.problem("client_ca", e.to_string(), "give PEM files of the CA and of its revocation lists")
    };
    let config = Arc::new(config.map_err(fail).ok()?);
    Some(EdgeTls { config, certificates, takes_certificates: clients.is_some() })
}

fn read_clients(r: &Reader<'_>) -> Option<Clients> {
    let is_required = r.choice("client_auth", &[("optional", false), ("required", true)], false);
    let (ca, revoked) = (r.get::<PathBuf>("client_ca"), r.get::<Vec<String>>("client_crl"));
    let Some(ca) = ca else {
        for key in ["client_auth", "client_crl"].into_iter().filter(|key| r.has(key)) {
            r.problem(
                key,
                "stands here without client_ca",
                "set client_ca to the PEM file of who signs clients' certificates",
            );
        }
        return None;
    };
    let revoked = revoked.unwrap_or_default().into_iter().map(PathBuf::from).collect();
    Some(Clients { ca, revoked, is_required })
}

impl LimitsConfig {
    fn read(r: &Reader<'_>) -> Self {
        let quotas = Quotas::read(r);
        Self {
            body_bytes_max: read_size(r, "max_body", ByteSize::mib(8)),
            headers_max: r.in_range("max_headers", 1..=256, 100),
            header_bytes_max: read_size(r, "max_header_bytes", ByteSize::kib(64)),
            concurrent_requests_max: r.in_range("max_concurrent_requests", 1..=1_000_000, 1024),
            header_timeout: r.duration_or("header_timeout", Duration::from_secs(10)),
            body_timeout: r.duration_or("body_timeout", Duration::from_secs(30)),
            idle_timeout: r.duration_or("idle_timeout", Duration::from_secs(60)),
            write_timeout: r.duration_or("write_timeout", Duration::from_secs(30)),
            doors: DoorsConfig::read(r, quotas.tracked_max),
            connections_per_address_max: r.in_range("max_connections_per_address", 1..=1_000_000, 1024),
            quotas,
        }
    }
}

pub(crate) fn read_size(r: &Reader<'_>, key: &str, default: ByteSize) -> usize {
    let size = r.get_or(key, default).as_u64();
    match usize::try_from(size) {
        Ok(bytes) if bytes > 0 && size <= ByteSize::gib(4).as_u64() => bytes,
        _ => {
            r.problem(key, "is outside 1 byte to 4 GiB", "give a size such as \"8MiB\"");
            default.as_u64() as usize
        }
    }
}

impl HealthConfig {
    fn read(r: &Reader<'_>) -> Self {
        let second = Duration::from_secs(1);
        Self {
            interval: r.duration_or("interval", second),
            timeout: r.duration_or("timeout", second),
            rules: Rules {
                up: r.in_range("up", 1..=100, 2),
                down: r.in_range("down", 1..=100, 3),
                slow_start: r.get_or("slow_start", second * 10),
                panic_percent: r.in_range("panic_threshold", 0..=100, 50),
            },
        }
    }
}

impl RelayConfig {
    fn read(r: &Reader<'_>) -> Self {
        Self {
            connect_timeout: r.duration_or("connect_timeout", Duration::from_secs(1)),
            stall_timeout: r.duration_or("stall_timeout", Duration::from_secs(5)),
            resumes_max: r.in_range("max_resumes", 0..=100, 3),
            queue_wait: r.get_or("queue_wait", Duration::from_secs(10)),
            moves_per_second: r.in_range("moves_per_second", 1..=1_000_000, 200),
            moves_burst: r.in_range("moves_burst", 1..=1_000_000, 1000),
            request_timeout: r.duration_or("request_timeout", Duration::from_secs(300)),
        }
    }
}

impl UpstreamTls {
    fn read(r: &Reader<'_>) -> Option<Self> {
        let identity = read_pair(r, "cert", "key");
        let Some(ca) = r.get::<PathBuf>("ca") else {
            if r.is_present() {
                r.problem("ca", "is missing", "name the PEM file that nodes are verified by, or remove the section");
            }
            return None;
        };
        let this = Self { ca, identity };
        if let Err(e) = this.check() {
            r.problem("ca", e.to_string(), "give PEM files of the CA, and of a certificate with its key");
        }
        Some(this)
    }

    /// Whether the files make a usable client, found out by making one.
    pub(crate) fn check(&self) -> Result<(), tls::TlsError> {
        let identity = self.identity.as_ref().map(|(cert, key)| Identity::read(cert, key)).transpose()?;
        tls::client_config(&self.ca, identity.as_ref()).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use tidegate_common::config::{Problems, Raw};

    use super::*;

    fn read(text: &str) -> Result<BalancerConfig, Problems> {
        Raw::from_toml(text, "t").unwrap().check(BalancerConfig::read)
    }

    fn paths(text: &str) -> Vec<String> {
        let mut paths: Vec<String> = read(text).unwrap_err().0.into_iter().map(|p| p.path).collect();
        paths.sort();
        paths
    }

    #[test]
    fn nothing_said_means_plain_http_on_loopback() {
        let config = read("").unwrap();
        assert_eq!(config.listen_addresses(), [address(LISTEN)]);
        assert_eq!(config.admin_address(), address(ADMIN_LISTEN));
        assert!(!config.uses_tls());
    }

    #[test]
    fn plaintext_and_open_doors_beyond_loopback_must_be_asked_for_in_words() {
        let open = "[balancer]\nlisten = \"0.0.0.0:80\"\n";
        assert_eq!(paths(open), ["balancer.listen[0]", "balancer.listen[0]"]);
        assert!(read(&format!("{open}insecure = true")).is_ok());
        assert_eq!(paths("[balancer.admin]\nlisten = \"10.0.0.1:80\""), ["balancer.admin.listen"]);
    }

    #[test]
    fn every_fault_is_found_in_one_run_files_included() {
        let text = "[balancer]\nthreads = 0\nallow = [\"10.0.0.0/8\", \"moon\"]\n[balancer.tls]\ncert = \"/no/c\"\nkey = \"/no/k\"\n\
                    [balancer.auth]\nkeys_file = \"/no/keys\"\n[balancer.relay]\nmax_resume = 2\n[balancer.upstream_tls]\nca = \"/no/ca\"";
        let expected = [
            "balancer.allow[1]",
            "balancer.auth.keys_file",
            "balancer.relay.max_resume",
            "balancer.threads",
            "balancer.tls.cert",
            "balancer.upstream_tls.ca",
        ];
        assert_eq!(paths(text), expected);
    }
}
