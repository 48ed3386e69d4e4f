//! Reaching etcd: one new client for each attempt, to one endpoint at a time, and an end to every wait.

use std::{
    fs,
    future::Future,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use etcd_client::{Certificate, Client, ConnectOptions, Error, Identity, TlsOptions};
use rand::RngExt;
use tokio::time;

use crate::{config::EtcdConfig, registry::OpenError, tls};

/// How often an open watch asks its member for a sign of life. etcd closes connections that ask more often than every 5 s.
const PING_INTERVAL: Duration = Duration::from_secs(6);

/// Why contact with etcd was given up.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    /// etcd or the way to it said no.
    #[error("{0}")]
    Etcd(#[from] Error),
    /// No answer came in time.
    #[error("no answer to '{call}' within {limit:?}")]
    Silent {
        /// Which call.
        call: &'static str,
        /// The bound it had.
        limit: Duration,
    },
    /// A file that the connection needs is no longer readable.
    #[error("{0}")]
    File(#[from] OpenError),
    /// The watch ended without an error.
    #[error("the watch ended")]
    Ended,
}

/// Makes clients.
#[derive(Debug)]
pub(super) struct Dialer {
    config: EtcdConfig,
    next: AtomicUsize,
}

impl Dialer {
    /// Checks that all files can be used now.
    ///
    /// # Errors
    /// When one cannot.
    pub(super) fn new(config: EtcdConfig) -> Result<Self, OpenError> {
        check_files(&config)?;
        // processes that start together do not all begin with the same member
        let first = rand::rng().random_range(0..config.endpoints.len().max(1));
        let dialer = Self { config, next: AtomicUsize::new(first) };
        dialer.options("https://")?;
        Ok(dialer)
    }

    /// What was configured.
    pub(super) fn config(&self) -> &EtcdConfig {
        &self.config
    }

    /// A new client, to the endpoint after the one that was tried last. Files are read again, so a renewed certificate is taken up.
    ///
    /// # Errors
    /// When the endpoint cannot be used. One that is only down may show at the first call.
    pub(super) async fn dial(&self) -> Result<Client, LinkError> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let endpoint = &self.config.endpoints[turn % self.config.endpoints.len()];
        let options = self.options(endpoint)?;
        self.bounded("connect", Client::connect([endpoint.as_str()], Some(options))).await
    }

    /// Waits for one call, but not for ever.
    ///
    /// # Errors
    /// The call's own, or that it gave no answer.
    pub(super) fn bounded<T>(
        &self,
        call: &'static str,
        waiting: impl Future<Output = Result<T, Error>>,
    ) -> impl Future<Output = Result<T, LinkError>> {
        let limit = self.config.timeout;
        // the client's futures are large: on the heap, so that ours stay small
        let waiting = Box::pin(waiting);
        async move {
            match time::timeout(limit, waiting).await {
                Ok(answer) => Ok(answer?),
                Err(_) => Err(LinkError::Silent { call, limit }),
            }
        }
    }

    fn options(&self, endpoint: &str) -> Result<ConnectOptions, OpenError> {
        let timeout = self.config.timeout;
        let mut options = ConnectOptions::new()
            .with_connect_timeout(timeout)
            .with_keep_alive(PING_INTERVAL, timeout)
            // etcd allows no pings on a connection without a stream
            .with_keep_alive_while_idle(false)
            // a member cut off from the others says so instead of staying silent
            .with_require_leader(true);
        if endpoint.starts_with("https://") {
            options = options.with_tls(self.tls()?);
        }
        if let Some((user, file)) = &self.config.credentials {
            let password = String::from_utf8_lossy(&read(file)?).trim_end_matches(['\r', '\n']).to_owned();
            // an expired token says nothing about etcd: the call is made again with a new one
            options = options.with_user(user, password).with_auto_token_refresh(true);
        }
        Ok(options)
    }

    fn tls(&self) -> Result<TlsOptions, OpenError> {
        let mut tls = TlsOptions::new();
        if let Some(ca) = &self.config.ca {
            tls = tls.ca_certificate(Certificate::from_pem(read(ca)?));
        }
        if let Some((cert, key)) = &self.config.identity {
            tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
        }
        Ok(tls)
    }
}

fn check_files(config: &EtcdConfig) -> Result<(), OpenError> {
    if let Some(ca) = &config.ca {
        tls::read_roots(ca)?;
    }
    if let Some((cert, key)) = &config.identity {
        tls::Identity::read(cert, key)?;
    }
    Ok(())
}

fn read(path: &std::path::Path) -> Result<Vec<u8>, OpenError> {
    fs::read(path).map_err(|source| OpenError::File { path: path.display().to_string(), source })
}

/// Pauses between attempts: each twice the one before, up to a bound, and never the same for two processes.
#[derive(Debug)]
pub(super) struct Backoff {
    next: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const LAST: Duration = Duration::from_secs(2);

    /// The first pause comes next.
    pub(super) fn new() -> Self {
        Self { next: Self::FIRST }
    }

    /// Whether no pause was taken since the last success.
    pub(super) fn is_fresh(&self) -> bool {
        self.next == Self::FIRST
    }

    /// An attempt succeeded.
    pub(super) fn reset(&mut self) {
        *self = Self::new();
    }

    /// How long to pause now.
    pub(super) fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(Self::LAST);
        jittered(pause)
    }
}

/// Between half and all of `length`.
pub(super) fn jittered(length: Duration) -> Duration {
    length.mul_f64(rand::rng().random_range(0.5..1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> EtcdConfig {
        EtcdConfig {
            endpoints: vec!["http://127.0.0.1:1".into()],
            lease_ttl: Duration::from_secs(10),
            timeout: Duration::from_secs(1),
            resync_interval: Duration::from_secs(30),
            ca: None,
            identity: None,
            credentials: None,
        }
    }

    #[test]
    fn pauses_grow_to_a_bound_and_begin_again_after_success() {
        let mut backoff = Backoff::new();
        let pauses: Vec<Duration> = (0..8).map(|_| backoff.pause()).collect();
        assert!(pauses[0] <= Backoff::FIRST && pauses[0] >= Backoff::FIRST / 2);
        assert!(pauses[7] <= Backoff::LAST && pauses[7] >= Backoff::LAST / 2);
        assert!(!backoff.is_fresh());
        backoff.reset();
        assert!(backoff.is_fresh() && backoff.pause() <= Backoff::FIRST);
    }

    #[test]
    fn a_file_that_is_not_there_is_told_at_once() {
        let missing = std::path::PathBuf::from("/nonexistent/secret");
        let by_ca = EtcdConfig { ca: Some(missing.clone()), ..config() };
        let by_identity = EtcdConfig { identity: Some((missing.clone(), missing.clone())), ..config() };
        let by_password = EtcdConfig { credentials: Some(("u".into(), missing)), ..config() };
        for config in [by_ca, by_identity, by_password] {
            let text = Dialer::new(config).unwrap_err().to_string();
            assert!(text.contains("/nonexistent/secret"), "{text}");
        }
    }
}
