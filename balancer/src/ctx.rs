//! One request's frame: drawn once when its head has been read, the same for every node that the request meets.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use http::{HeaderValue, Method, Uri, header::USER_AGENT};
use pingora::protocols::{http::ServerSession, tls::SslDigest};
use tidegate_common::{
    contract::{ApiError, headers, paths},
    ids::{RequestId, SiteName},
};
use tokio::time::Instant;

use crate::{
    auth::{Principal, UnixSeconds},
    limits::Allowance,
    policy::{Policies, Who},
    proxied::Trusted,
    route::{self, Route},
};

/// What every answer carries.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stamp<'a> {
    pub(crate) id: &'a RequestId,
    pub(crate) allowance: Option<&'a Allowance>,
    /// What the cache had of it, where there is one.
    pub(crate) cache: Option<&'static str>,
}

/// The frame of one request.
#[derive(Debug, Clone)]
pub(crate) struct RequestCtx {
    /// The client's id when it is well formed, else a new one.
    pub(crate) id: RequestId,
    pub(crate) method: Method,
    /// The path as a label: one of the API's or `other`.
    pub(crate) path: &'static str,
    /// What it asked for, where that is none of the API's paths.
    pub(crate) target: Option<Uri>,
    pub(crate) client: Option<IpAddr>,
    pub(crate) http: &'static str,
    /// How its connection is secured.
    pub(crate) tls: Option<Arc<SslDigest>>,
    /// What it calls itself.
    pub(crate) agent: Option<HeaderValue>,
    /// Who asks, where credentials are asked for.
    pub(crate) principal: Option<Arc<Principal>>,
    /// What the policies call it.
    pub(crate) action: &'static str,
    pub(crate) policies: Arc<Policies>,
    pub(crate) started: Instant,
    /// The answer's `created`.
    pub(crate) created: UnixSeconds,
    /// What the client has left of its limits.
    pub(crate) allowance: Option<Box<Allowance>>,
    /// What the cache had of it, where there is one.
    pub(crate) cache: Option<&'static str>,
    /// Up to how many bytes its answer is copied for the cache.
    pub(crate) copy_bytes_max: usize,
}

impl RequestCtx {
    /// Whose credential it came with.
    pub(crate) fn tenant(&self) -> Option<&Arc<str>> {
        self.principal.as_ref().map(|principal| &principal.owner)
    }

    /// Refuses a model that who asks may not use.
    pub(crate) fn demand_model(&self, model: &str) -> Result<(), ApiError> {
        self.demand_model_for(self.action, model)
    }

    fn demand_model_for(&self, action: &str, model: &str) -> Result<(), ApiError> {
        self.principal.as_ref().map_or(Ok(()), |principal| principal.demand_model(model))?;
        self.demand(action, format_args!("model:{model}"))
    }

    /// Refuses what the policies do not allow to be done to this.
    fn demand(&self, action: &str, resource: fmt::Arguments<'_>) -> Result<(), ApiError> {
        self.policies.demand(|| Who::new(self.principal.as_deref(), self.client), action, resource)
    }

    /// Refuses a path that who asks may not use.
    pub(crate) fn demand_path(&self) -> Result<(), ApiError> {
        self.demand(self.action, format_args!("path:{}", self.path))
    }

    /// Whether a list of models shows this one to who asks.
    pub(crate) fn shows_model(&self, model: &str) -> bool {
        self.demand_model_for(Route::Generation(paths::CHAT_COMPLETIONS).action(), model).is_ok()
    }

    /// Whether the request may go to a node at this site.
    pub(crate) fn may_go_to(&self, site: &SiteName) -> bool {
        self.principal.as_ref().is_none_or(|principal| principal.may_go_to(site))
    }

    /// Who takes a share of a node with it: the key's owner, else the client's address, of IPv6 the network of one site.
    pub(crate) fn payer(&self) -> Option<Arc<str>> {
        self.tenant().cloned().or_else(|| self.network().map(|address| address.to_string().into()))
    }

    /// The client's address, as limits count it.
    pub(crate) fn network(&self) -> Option<IpAddr> {
        self.client.map(network)
    }

    /// What every answer to it carries.
    pub(crate) fn stamp(&self) -> Stamp<'_> {
        Stamp { id: &self.id, allowance: self.allowance.as_deref(), cache: self.cache }
    }

    /// The frame of the request whose head `session` has just read.
    pub(crate) fn of(session: &ServerSession, trusted: &Trusted) -> Self {
        let head = session.req_header();
        let unread = Self::of_unread(session);
        let given = session.get_header(headers::REQUEST_ID).and_then(|v| v.to_str().ok());
        let path = route::label(head.uri.path());
        Self {
            id: RequestId::from_client(given),
            method: head.method.clone(),
            path,
            target: (path == route::OTHER).then(|| head.uri.clone()),
            agent: session.get_header(USER_AGENT).cloned(),
            client: unread.client.map(|peer| trusted.client(peer, &head.headers)),
            principal: None,
            ..unread
        }
    }

    /// The frame of a request whose head could not be read.
    pub(crate) fn of_unread(session: &ServerSession) -> Self {
        Self {
            id: RequestId::random(),
            method: Method::default(),
            path: route::OTHER,
            target: None,
            client: session.client_addr().and_then(|a| a.as_inet()).map(|a| a.ip().to_canonical()),
            http: session.session_type(),
            tls: session.digest().and_then(|digest| digest.ssl_digest.clone()),
            agent: None,
            principal: None,
            action: "",
            policies: Arc::default(),
            started: Instant::now(),
            created: UnixSeconds::now(),
            allowance: None,
            cache: None,
            copy_bytes_max: 0,
        }
    }
}

/// The address that limits count: of IPv6 the network of one site, since who has one has all of its addresses.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
    }
}
