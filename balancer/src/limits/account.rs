//! One request's account: who is charged for it, what it has reserved, and what it really used in the end.
//!
//! A request meets its limits three times. Its address is asked for before any credential is looked at, so that guessing keys is slow. Then
//! key, tenant and everybody together are charged for one request and one stream. Once the body has told what is wanted, tokens are
//! reserved by an estimate, and settled when the last byte has passed. Who is over a limit of its own is never charged to everybody's.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus::{IntCounterVec, IntGauge};
use tidegate_common::contract::{ApiError, ErrorKind};
use tokio::time::Instant;

use super::{
    allowance::Allowance,
    ledger::{Ask, Charge, Ledger, Over, Who},
    quota::{Quota, Quotas},
};
use crate::{ctx::RequestCtx, metrics::Metrics};

/// What everybody has used lately. It outlives the configuration, so a reload forgets nothing.
pub(crate) struct Limits {
    ledger: Mutex<Ledger>,
    began: Instant,
    limited: IntCounterVec,
    tabs: IntGauge,
}

impl Limits {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        Self {
            ledger: Mutex::default(),
            began: Instant::now(),
            limited: metrics.limited.clone(),
            tabs: metrics.limit_tabs.clone(),
        }
    }

    /// Whether another request of the client's address may come, whoever it is.
    pub(crate) fn knock(&self, quotas: &Quotas, ctx: &mut RequestCtx) -> Result<(), ApiError> {
        let quota = Quota { requests: quotas.per_address.requests, ..Quota::default() };
        let charge = ctx.network().map(|address| Charge { who: Who::Address(address), quota, is_own: false });
        let charges = charge.and_then(|charge| charge.share(quotas.balancers));
        self.admit(charges.as_slice(), Ask { requests: 1.0, ..Ask::default() }, quotas, ctx)
    }

    /// A request of somebody known. One that is a stream takes a place too, until the account is dropped.
    pub(crate) fn enter(
        self: &Arc<Self>,
        is_stream: bool,
        quotas: &Quotas,
        ctx: &mut RequestCtx,
    ) -> Result<Account, ApiError> {
        let charges = charges(quotas, ctx);
        self.admit(&charges, Ask { requests: 1.0, tokens: 0.0, stream: is_stream }, quotas, ctx)?;
        Ok(Account {
            limits: Arc::clone(self),
            charges,
            tabs_max: quotas.tracked_max,
            has_place: is_stream,
            reserved: 0.0,
        })
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

/// Whom the request is charged to; who comes first has the narrowest limits. Requests of its address are charged by then.
fn charges(quotas: &Quotas, ctx: &RequestCtx) -> Vec<Charge> {
    let principal = ctx.principal.as_deref();
    let key = principal.map(|principal| {
        let own = Quota::from(&principal.grant.limits);
        let who = Who::Key(principal.credential.kind, Arc::clone(&principal.credential.id));
        Charge { who, quota: own.or(&quotas.per_key), is_own: !own.is_none() }
    });
    let tenant = principal.map(|principal| Who::Tenant(Arc::clone(&principal.owner)));
    let address = Quota { requests: None, ..quotas.per_address };
    let configured = [
        tenant.map(|who| Charge { who, quota: quotas.per_tenant, is_own: false }),
        ctx.network().map(|address_of| Charge { who: Who::Address(address_of), quota: address, is_own: false }),
        Some(Charge { who: Who::Everybody, quota: quotas.total, is_own: false }),
    ];
    let all = key.into_iter().chain(configured.into_iter().flatten());
    all.filter_map(|charge| charge.share(quotas.balancers)).collect()
}

/// What one request is charged for, until its last byte.
pub(crate) struct Account {
    limits: Arc<Limits>,
    charges: Vec<Charge>,
    tabs_max: usize,
    has_place: bool,
    reserved: f64,
}

impl Account {
    /// Reserves so many tokens.
    pub(crate) fn reserve(&mut self, tokens: u64, quotas: &Quotas, ctx: &mut RequestCtx) -> Result<(), ApiError> {
        let tokens = tokens as f64;
        self.limits.admit(&self.charges, Ask { tokens, ..Ask::default() }, quotas, ctx)?;
        self.reserved = tokens;
        Ok(())
    }

    /// So many tokens were used in the end.
    pub(crate) fn settle(self, tokens: u64) {
        let (now_s, mut ledger) = (self.limits.now_s(), self.limits.lock());
        for charge in &self.charges {
            let Some(rate) = charge.quota.tokens else { continue };
            let over = tokens as f64 - self.reserved.min(rate.burst);
            ledger.correct(charge, Ask { tokens: over, ..Ask::default() }, self.tabs_max, now_s);
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        if self.has_place && !self.charges.is_empty() {
            let mut ledger = self.limits.lock();
            self.charges.iter().for_each(|charge| ledger.leave(&charge.who));
        }
    }
}
