//! Limits that hold over several balancers, by counts in Redis. Each request is one call there, atomic by a script.
//!
//! Redis is asked only while it answers in time. A task of its own connects, and hands the connection out once it has answered a ping in the
//! time that a request may wait; three calls in a row that do not answer take it back. Without one nobody waits, and each balancer grants
//! its share of the limits by its own count, which it keeps all the time. So an outage costs a request nothing, and three of them the
//! timeout.

use std::{
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use rand::RngExt;
use redis::{AsyncConnectionConfig, Client, IntoConnectionInfo, Script, TlsCertificates, aio::MultiplexedConnection};
use tidegate_common::config::Reader;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tracing::{info, warn};

use super::{
    ledger::{Charge, Over, Who},
    quota::Kind,
    rate::Rate,
};

/// Calls in a row without an answer after which a connection is given up.
const FAILURES_MAX: u32 = 3;
/// How long a connection may take to come about; no request waits for it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Pauses between attempts to connect.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_LAST: Duration = Duration::from_secs(2);

/// `[balancer.limits.shared]`.
#[derive(Debug, Clone)]
pub(crate) struct SharedConfig {
    /// How many balancers share the limits, where no registry says so.
    pub(crate) balancers: usize,
    pub(crate) redis: Option<RedisConfig>,
}

/// How to reach Redis.
#[derive(Clone)]
pub(crate) struct RedisConfig {
    client: Client,
    prefix: String,
    /// What a request waits for an answer.
    timeout: Duration,
}

/// It may hold a password.
impl fmt::Debug for RedisConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisConfig").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl SharedConfig {
    pub(crate) fn read(r: &Reader<'_>) -> Self {
        Self { balancers: r.in_range("balancers", 1..=10_000, 1), redis: RedisConfig::read(r) }
    }
}

impl RedisConfig {
    fn read(r: &Reader<'_>) -> Option<Self> {
        let (url, password_file, ca) = (r.get::<String>("redis"), r.get("password_file"), r.get("ca"));
        let prefix = r.get_or("prefix", "tidegate".to_owned());
        let timeout = r.duration_or("timeout", Duration::from_millis(20));
        let text = |key: &str, path: Option<std::path::PathBuf>| -> Option<String> {
            let path = path?;
            let told =
                |e: std::io::Error| r.problem(key, format!("{}: {e}", path.display()), "name a file that can be read");
            std::fs::read_to_string(&path).map_err(told).ok()
        };
        let (password, ca) = (text("password_file", password_file), text("ca", ca));
        // what the library says of a bad URL may repeat its password
        let told = |_| {
            let fix = "write redis://host:6379/0, or rediss:// for TLS";
            r.problem("redis", "is not the URL of a Redis", fix);
        };
        let client = client(&url?, password.as_deref().map(str::trim_end), ca).map_err(told).ok()?;
        Some(Self { client, prefix, timeout })
    }
}

fn client(url: &str, password: Option<&str>, ca: Option<String>) -> redis::RedisResult<Client> {
    let mut info = url.into_connection_info()?;
    if let Some(password) = password {
        let settings = info.redis_settings().clone().set_password(password);
        info = info.set_redis_settings(settings);
    }
    match ca {
        Some(ca) => {
            Client::build_with_tls(info, TlsCertificates { client_tls: None, root_cert: Some(ca.into_bytes()) })
        }
        None => Client::open(info),
    }
}

/// The counts in Redis.
pub(crate) struct Shared {
    config: RedisConfig,
    /// There while Redis answers in time.
    connection: ArcSwapOption<MultiplexedConnection>,
    /// Calls in a row without an answer.
    failures: AtomicU32,
    lost: Notify,
    charge: Script,
    settle: Script,
}

/// What Redis said of a request.
#[derive(Debug, PartialEq)]
pub(crate) enum Said {
    /// All were charged; what each has used of requests and tokens.
    Granted(Vec<[f64; 2]>),
    /// One of them is over.
    Over(Over, Vec<[f64; 2]>),
    /// Nothing in time.
    Nothing,
}

impl Shared {
    /// Begins to connect. It ends with the last reference to what is returned.
    pub(crate) fn open(config: RedisConfig) -> Arc<Self> {
        let this = Arc::new(Self {
            config,
            connection: ArcSwapOption::empty(),
            failures: AtomicU32::new(0),
            lost: Notify::new(),
            charge: Script::new(include_str!("charge.lua")),
            settle: Script::new(include_str!("settle.lua")),
        });
        tokio::spawn(keep(Arc::downgrade(&this)));
        this
    }

    /// Whether it answers now.
    pub(crate) fn is_up(&self) -> bool {
        self.connection.load().is_some()
    }

    /// Charges `charges` for one request and so many tokens, and gives them a place for `stream` for as long as `life`.
    pub(super) async fn charge(&self, charges: &[Charge], tokens: f64, stream: &str, life: Duration) -> Said {
        let mut call = self.charge.prepare_invoke();
        self.keys(&mut call, charges);
        call.arg(stream).arg(life.as_millis() as u64);
        for Charge { quota, .. } in charges {
            for (rate, cost) in [(quota.requests, 1.0), (quota.tokens, tokens)] {
                let Rate { per_second, burst } = rate.unwrap_or(Rate { per_second: 1.0, burst: 0.0 });
                call.arg(per_second).arg(burst).arg(cost);
            }
            call.arg(quota.streams.unwrap_or(0));
        }
        match self.ask::<Vec<i64>>(&call).await {
            Some(answer) => said(charges, &answer),
            None => Said::Nothing,
        }
    }

    /// A stream has ended, and so many tokens more were used of each than were charged.
    pub(super) async fn settle(&self, charges: &[Charge], more: &[f64], stream: &str) {
        let mut call = self.settle.prepare_invoke();
        self.keys(&mut call, charges);
        call.arg(stream);
        for (charge, more) in charges.iter().zip(more) {
            call.arg(charge.quota.tokens.map_or(0.0, |rate| rate.per_second)).arg(*more);
        }
        self.ask::<i64>(&call).await;
    }

    /// All in one slot of a Redis Cluster, since one script has them all.
    fn keys(&self, call: &mut redis::ScriptInvocation<'_>, charges: &[Charge]) {
        for Charge { who, .. } in charges {
            let name = match who {
                Who::Key(kind, id) => format!("key:{}:{id}", kind.as_str()),
                Who::Tenant(owner) => format!("tenant:{owner}"),
                Who::Address(address) => format!("address:{address}"),
                Who::Everybody => "total".into(),
            };
            let prefix = &self.config.prefix;
            call.key(format!("{{{prefix}}}:limits:{name}")).key(format!("{{{prefix}}}:streams:{name}"));
        }
    }

    async fn ask<T: redis::FromRedisValue>(&self, call: &redis::ScriptInvocation<'_>) -> Option<T> {
        let mut connection = MultiplexedConnection::clone(&*self.connection.load_full()?);
        match timeout(self.config.timeout, call.invoke_async(&mut connection)).await {
            Ok(Ok(answer)) => {
                self.failures.store(0, Relaxed);
                return Some(answer);
            }
            Ok(Err(error)) => self.failed(&error),
            Err(_) => self.failed(&"no answer in time"),
        }
        None
    }

    fn failed(&self, error: &dyn fmt::Display) {
        if self.failures.fetch_add(1, Relaxed) + 1 == FAILURES_MAX {
            warn!(%error, "redis does not answer; each balancer grants its share of the limits");
            self.connection.store(None);
            self.lost.notify_one();
        }
    }

    async fn connect(&self) -> Result<MultiplexedConnection, String> {
        let config =
            AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECT_TIMEOUT)).set_response_timeout(None);
        let connected = self.config.client.get_multiplexed_async_connection_with_config(&config);
        // the library's own future is large
        let connected = timeout(CONNECT_TIMEOUT, Box::pin(connected)).await.map_err(|_| "no connection in time")?;
        let mut connection = connected.map_err(|e| e.to_string())?;
        for script in [&self.charge, &self.settle] {
            script.load_async(&mut connection).await.map_err(|e| e.to_string())?;
        }
        let ping = redis::cmd("PING");
        let pong = timeout(self.config.timeout, ping.query_async::<String>(&mut connection)).await;
        pong.map_err(|_| "it takes longer than balancer.limits.shared.timeout")?.map_err(|e| e.to_string())?;
        Ok(connection)
    }
}

/// What the script's answer means.
fn said(charges: &[Charge], answer: &[i64]) -> Said {
    let [over, kind, wait_ms, used @ ..] = answer else { return Said::Nothing };
    let used = used.chunks_exact(2).map(|pair| [pair[0] as f64 / 1e3, pair[1] as f64 / 1e3]).collect();
    if *over == 0 {
        return Said::Granted(used);
    }
    let Some(charge) = usize::try_from(over - 1).ok().and_then(|at| charges.get(at)) else { return Said::Nothing };
    let kind = match kind {
        1 => Kind::Requests,
        2 => Kind::Tokens,
        _ => Kind::Streams,
    };
    Said::Over(charge.over(kind, Duration::from_millis(wait_ms.unsigned_abs())), used)
}

/// Connects again and again, for as long as anybody has it.
async fn keep(shared: Weak<Shared>) {
    let mut pause = PAUSE_FIRST;
    loop {
        let Some(this) = shared.upgrade() else { return };
        match timeout(CONNECT_TIMEOUT, this.connect()).await.unwrap_or_else(|_| Err("no answer in time".into())) {
            Ok(connection) => {
                info!("redis counts the limits");
                this.failures.store(0, Relaxed);
                this.connection.store(Some(Arc::new(connection)));
                pause = PAUSE_FIRST;
                wait_for_loss(this, &shared).await;
            }
            Err(error) => {
                if pause == PAUSE_FIRST {
                    warn!(%error, "redis is out of reach; each balancer grants its share of the limits");
                }
                drop(this);
                let jitter = rand::rng().random_range(0.5..1.0);
                sleep(pause.mul_f64(jitter)).await;
                pause = (pause * 2).min(PAUSE_LAST);
            }
        }
    }
}

/// Returns when the connection was given up, or nobody has it any more.
async fn wait_for_loss(this: Arc<Shared>, shared: &Weak<Shared>) {
    let mut this = Some(this);
    while let Some(held) = this.take() {
        if timeout(PAUSE_LAST, held.lost.notified()).await.is_ok() {
            return;
        }
        drop(held);
        this = shared.upgrade();
    }
}

#[cfg(test)]
mod tests {
    use tidegate_common::config::Raw;

    use super::*;
    use crate::limits::quota::Quota;

    #[test]
    fn a_bad_url_is_told_without_its_password() {
        let read = |text: &str| Raw::from_toml(text, "t").unwrap().check(SharedConfig::read);
        assert!(read("redis = \"redis://127.0.0.1:6379/0\"").unwrap().redis.is_some());
        assert!(read("").unwrap().redis.is_none());
        let problems =
            read("redis = \"http://:hunter2@x\"\ntimeout = \"0s\"\npassword_file = \"/no/file\"").unwrap_err();
        let text = format!("{problems}");
        assert_eq!(problems.0.len(), 3, "{text}");
        assert!(!text.contains("hunter2"), "{text}");
        let secret = read("redis = \"redis://:hunter2@127.0.0.1\"").unwrap();
        assert!(!format!("{secret:?}").contains("hunter2"));
    }

    #[test]
    fn the_scripts_answer_names_who_is_over() {
        let charges = [Who::Everybody].map(|who| Charge { who, quota: Quota::default(), is_own: false });
        assert_eq!(said(&charges, &[0, 0, 0, 1500, 250]), Said::Granted(vec![[1.5, 0.25]]));
        let over = charges[0].over(Kind::Tokens, Duration::from_millis(70));
        assert_eq!(said(&charges, &[1, 2, 70, 0, 0]), Said::Over(over, vec![[0.0, 0.0]]));
        assert_eq!(said(&charges, &[2, 2, 70]), Said::Nothing);
        assert_eq!(said(&charges, &[]), Said::Nothing);
    }
}
