//! One request's account: who is charged for it, what it has reserved, and what it really used in the end.
//!
//! A request meets its limits three times. Its address is asked for before any credential is looked at, so that guessing keys is slow. Then
//! key, tenant and everybody together are charged for one request and one stream. Once the body has told what is wanted, tokens are
//! reserved by an estimate, and settled when the last byte has passed. Who is over a limit of its own is never charged to everybody's.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use prometheus::{IntCounterVec, IntGauge};
use tidegate_common::contract::{ApiError, ErrorKind};
use tokio::{runtime::Handle, time::Instant};

use super::{
    allowance::Allowance,
    ledger::{Ask, Charge, Ledger, Over, Who},
    quota::{Quota, Quotas},
    shared::{Said, Shared},
};
use crate::{ctx::RequestCtx, metrics::Metrics};

/// What everybody has used lately. It outlives the configuration, so a reload forgets nothing.
pub(crate) struct Limits {
    ledger: Mutex<Ledger>,
    began: Instant,
    /// Balancers of the cluster that are alive, this one among them; 0 while nobody has counted.
    balancers: AtomicUsize,
    limited: IntCounterVec,
    tabs: IntGauge,
    shared_calls: IntCounterVec,
    shared_up: IntGauge,
}

/// The limits in force.
#[derive(Clone, Copy)]
pub(crate) struct Rules<'a> {
    pub(crate) quotas: &'a Quotas,
    /// Where several balancers count together.
    pub(crate) shared: Option<&'a Arc<Shared>>,
    /// Longest life of a stream.
    pub(crate) life: Duration,
}

impl Limits {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        Self {
            ledger: Mutex::default(),
            began: Instant::now(),
            balancers: AtomicUsize::new(0),
            limited: metrics.limited.clone(),
            tabs: metrics.limit_tabs.clone(),
            shared_calls: metrics.shared_calls.clone(),
            shared_up: metrics.shared_up.clone(),
        }
    }

    /// So many balancers of the cluster are alive.
    pub(crate) fn count_balancers(&self, alive: usize) {
        self.balancers.store(alive, Relaxed);
    }

    /// Whether another request of the client's address may come, whoever it is.
    pub(crate) fn knock(&self, rules: Rules<'_>, ctx: &mut RequestCtx) -> Result<(), ApiError> {
        let quota = Quota { requests: rules.quotas.per_address.requests, ..Quota::default() };
        let charge = ctx.network().map(|address| Charge { who: Who::Address(address), quota, is_own: false });
        let charges = charge.and_then(|charge| charge.share(self.sharers(rules)));
        self.admit(charges.as_slice(), Ask { requests: 1.0, ..Ask::default() }, rules.quotas, ctx)
    }

    /// A request of somebody known. One that is a stream takes a place too, until the account is dropped.
    pub(crate) fn enter(
        self: &Arc<Self>,
        is_stream: bool,
        rules: Rules<'_>,
        ctx: &mut RequestCtx,
    ) -> Result<Account, ApiError> {
        // its address is charged for the request by now
        let address = Quota { requests: None, ..rules.quotas.per_address };
        let charges = charges(rules.quotas, address, self.sharers(rules), ctx);
        self.admit(&charges, Ask { requests: 1.0, tokens: 0.0, stream: is_stream }, rules.quotas, ctx)?;
        Ok(Account {
            limits: Arc::clone(self),
            charges,
            tabs_max: rules.quotas.tracked_max,
            has_place: is_stream,
            reserved: 0.0,
            used: None,
            elsewhere: None,
        })
    }

    /// How many balancers each grant a share of the limits: only this one, where they count together.
    fn sharers(&self, rules: Rules<'_>) -> usize {
        match (rules.shared, self.balancers.load(Relaxed)) {
            (Some(shared), _) if shared.is_up() => 1,
            (_, 0) => rules.quotas.shared.balancers,
            (_, counted) => counted,
        }
    }

    fn admit(&self, charges: &[Charge], ask: Ask, quotas: &Quotas, ctx: &mut RequestCtx) -> Result<(), ApiError> {
        if charges.is_empty() {
            return Ok(());
        }
        let (now_s, mut ledger) = (self.now_s(), self.lock());
        let admitted = ledger.admit(charges, ask, quotas.tracked_max, now_s);
        let allowance = Allowance::of(&ledger, charges, now_s);
        self.tabs.set(ledger.len() as i64);
        drop(ledger);
        ctx.allowance = allowance.and(ctx.allowance.take());
        admitted.map_err(|over| self.refusal(over))
    }

    fn refusal(&self, Over { knob, wait }: Over) -> ApiError {
        self.limited.with_label_values(&[knob.scope.as_str(), knob.kind.as_str()]).inc();
        ApiError::new(ErrorKind::RateLimited, knob.kind.code(), knob.to_string()).with_retry_after(wait)
    }

    fn now_s(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whom a request is charged to; who comes first has the narrowest limits.
fn charges(quotas: &Quotas, per_address: Quota, sharers: usize, ctx: &RequestCtx) -> Vec<Charge> {
    let principal = ctx.principal.as_deref();
    let key = principal.map(|principal| {
        let own = Quota::from(&principal.grant.limits);
        let who = Who::Key(principal.credential.kind, Arc::clone(&principal.credential.id));
        Charge { who, quota: own.or(&quotas.per_key), is_own: !own.is_none() }
    });
    let tenant = principal.map(|principal| Who::Tenant(Arc::clone(&principal.owner)));
    let configured = [
        tenant.map(|who| Charge { who, quota: quotas.per_tenant, is_own: false }),
        ctx.network().map(|address| Charge { who: Who::Address(address), quota: per_address, is_own: false }),
        Some(Charge { who: Who::Everybody, quota: quotas.total, is_own: false }),
    ];
    let all = key.into_iter().chain(configured.into_iter().flatten());
    all.filter_map(|charge| charge.share(sharers)).collect()
}

/// What one request is charged for, until its last byte.
pub(crate) struct Account {
    limits: Arc<Limits>,
    charges: Vec<Charge>,
    tabs_max: usize,
    has_place: bool,
    reserved: f64,
    used: Option<f64>,
    elsewhere: Option<Elsewhere>,
}

/// What was charged where all balancers count.
struct Elsewhere {
    shared: Arc<Shared>,
    charges: Vec<Charge>,
    /// The stream's name there.
    stream: String,
}

impl Account {
    /// Reserves so many tokens, and charges the whole request where all balancers count.
    pub(crate) async fn reserve(
        &mut self,
        tokens: u64,
        rules: Rules<'_>,
        ctx: &mut RequestCtx,
    ) -> Result<(), ApiError> {
        let tokens = tokens as f64;
        if tokens > 0.0 {
            self.limits.admit(&self.charges, Ask { tokens, ..Ask::default() }, rules.quotas, ctx)?;
            self.reserved = tokens;
        }
        let charged = self.charge_elsewhere(rules, ctx).await;
        if charged.is_err() {
            self.used = Some(0.0);
        }
        charged
    }

    async fn charge_elsewhere(&mut self, rules: Rules<'_>, ctx: &mut RequestCtx) -> Result<(), ApiError> {
        let Some(shared) = rules.shared else { return Ok(()) };
        let charges = charges(rules.quotas, rules.quotas.per_address, 1, ctx);
        if charges.is_empty() {
            return Ok(());
        }
        // its own name, since a client may give two requests one id
        let stream = if self.has_place { format!("{:032x}", rand::random::<u128>()) } else { String::new() };
        let said = shared.charge(&charges, self.reserved, &stream, rules.life).await;
        self.limits.shared_up.set(shared.is_up().into());
        let (outcome, charged) = match said {
            Said::Granted(used) => {
                ctx.allowance = Allowance::of_used(&charges, &used).and(None);
                self.elsewhere = Some(Elsewhere { shared: Arc::clone(shared), charges, stream });
                ("granted", Ok(()))
            }
            Said::Over(over, used) => {
                ctx.allowance = Allowance::of_used(&charges, &used).and(None);
                ("refused", Err(self.limits.refusal(over)))
            }
            Said::Nothing => ("alone", Ok(())),
        };
        self.limits.shared_calls.with_label_values(&[outcome]).inc();
        charged
    }

    /// So many tokens were used in the end.
    pub(crate) fn settle(mut self, tokens: u64) {
        self.used = Some(tokens as f64);
    }

    /// What is to be added to each for what was used beyond its reservation.
    fn more(charges: &[Charge], reserved: f64, used: f64) -> impl Iterator<Item = f64> {
        charges.iter().map(move |charge| charge.quota.tokens.map_or(0.0, |rate| used - reserved.min(rate.burst)))
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        if !self.charges.is_empty() && (self.has_place || self.used.is_some()) {
            let (now_s, mut ledger) = (self.limits.now_s(), self.limits.lock());
            let more = Self::more(&self.charges, self.reserved, self.used.unwrap_or(self.reserved));
            for (charge, tokens) in self.charges.iter().zip(more).filter(|(_, more)| *more != 0.0) {
                ledger.correct(charge, Ask { tokens, ..Ask::default() }, self.tabs_max, now_s);
            }
            if self.has_place {
                self.charges.iter().for_each(|charge| ledger.leave(&charge.who));
            }
        }
        // at the very end there is no runtime any more, and places there run out by themselves
        if let (Some(Elsewhere { shared, charges, stream }), Ok(runtime)) =
            (self.elsewhere.take(), Handle::try_current())
        {
            let more: Vec<f64> = Self::more(&charges, self.reserved, self.used.unwrap_or(self.reserved)).collect();
            if self.has_place || more.iter().any(|more| *more != 0.0) {
                runtime.spawn(async move { shared.settle(&charges, &more, &stream).await });
            }
        }
    }
}
