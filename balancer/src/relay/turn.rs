//! Who takes the next leg of a stream, or how long it waits for one who can.
//!
//! A node that has not been asked comes first; a stream that has begun is rather resumed on the node that was lost than not at all. Where
//! too few are ready, each request asks those that failed as well, after the others and once: what they do then is no surprise. When
//! nobody can be asked, because none is ready, none takes requests now, or too many streams are on the move, the request waits up to
//! `queue_wait` and then asks everyone anew; one that a node had taken and that now only lacks a place waits as long as it may take at all.
//! It goes on only where the answer would have been the same, by the fingerprint of those that began it.
//! Losses that may be the request's own doing are borne `max_resumes` times. A stream that has begun goes on at nodes alone: a foreign
//! upstream can neither take one up nor leave one that another could.

use std::{sync::Arc, time::Duration};

use tidegate_common::{
    contract::{ApiError, ErrorKind},
    ids::NodeId,
};
use tokio::time::{Instant, timeout};

use super::{
    Journey, Loss, Relay,
    client::{Client, Interrupt},
    delivered::TOKENS_MAX,
    request::Generation,
};
use crate::{
    pool::{Ring, Target},
    record::Record,
    route,
};

/// How often one who waits asks again when the pool has not changed: a node that was full may have room.
const ASK_AGAIN: Duration = Duration::from_millis(200);

/// Why there is no next leg.
pub(super) enum Stop {
    /// For this reason.
    Refused(ApiError),
    /// Nobody wants it any more.
    Interrupted(Interrupt),
}

/// Whom to ask now.
enum Turn {
    /// This one.
    Ask(Arc<Target>),
    /// Nobody yet; the error says why when the wait was in vain.
    Wait(Duration, ApiError),
    /// Nobody, and waiting does not help.
    Never(ApiError),
}

impl Relay {
    /// Who takes the next leg. Waits while nobody can.
    pub(super) async fn next(
        &self,
        client: &mut Client<'_>,
        record: &mut Record,
        generation: &Generation,
        journey: &mut Journey,
    ) -> Result<Arc<Target>, Stop> {
        loop {
            let changed = self.pool.changed();
            let (pause, error) = match self.turn(client, record, generation, journey) {
                Turn::Ask(target) => return Ok(target),
                Turn::Never(error) => return Err(Stop::Refused(error)),
                Turn::Wait(pause, error) => (pause, error),
            };
            let now = Instant::now();
            let patience = *journey.patience.get_or_insert(now + self.rules.queue_wait);
            let pause = match patience.saturating_duration_since(now) {
                _ if journey.waits_for_room() => pause,
                Duration::ZERO => return Err(Stop::Refused(error)),
                left => pause.min(left),
            };
            let _ = client.unless_interrupted(timeout(pause, changed)).await.map_err(Stop::Interrupted)?;
            journey.tried.clear();
        }
    }

    fn turn(&self, client: &Client<'_>, record: &mut Record, generation: &Generation, journey: &Journey) -> Turn {
        let is_resuming = journey.is_resuming(client);
        let losses_max = if is_resuming { self.rules.resumes_max } else { self.rules.resumes_max.max(1) };
        if is_resuming && self.rules.resumes_max > 0 && journey.is_too_long() {
            return Turn::Never(too_long());
        }
        if journey.suspicious > losses_max || (is_resuming && !self.may_resume(journey)) {
            return Turn::Never(journey.error());
        }
        let snapshot = self.pool.load();
        let (model, pool) = match route::pool(&snapshot, generation.model.as_deref()) {
            Ok(found) => found,
            Err(error) if error.code == route::NOBODY_READY => return Turn::Wait(ASK_AGAIN, error),
            Err(error) => return Turn::Never(error),
        };
        record.model = model.to_owned();
        if let Err(error) = record.ctx.demand_model(model) {
            return Turn::Never(error);
        }
        if pool.nodes == 0 && !generation.is_common() {
            return Turn::Never(not_abroad(generation, model));
        }
        let goes_abroad = generation.is_common() && !is_resuming;
        let begun_by = journey.delivered.fingerprint().filter(|_| is_resuming);
        let may_go = |target: &Target| (goes_abroad || target.foreign.is_none()) && record.ctx.may_go_to(&target.site);
        let pick = |ring: &Ring, avoid: &[NodeId]| {
            ring.pick(|target| may_go(target) && target.may_go_on(begun_by) && !avoid.contains(&target.id))
        };
        let preferred = generation.prefers.as_ref().filter(|_| journey.last.is_none());
        let preferred = preferred.and_then(|id| pool.ready.find(id)).filter(|target| may_go(target));
        let target = match preferred.or_else(|| pick(&pool.ready, &journey.tried)) {
            Some(untried) => Some(untried),
            // the same node again is better than none, for a stream that has begun
            None if is_resuming && !journey.was_refused() => {
                pick(&pool.ready, journey.last_asked()).or_else(|| pick(&pool.ready, &[]))
            }
            None => None,
        };
        let target = target.or_else(|| pick(&pool.suspects, &journey.tried_suspects));
        match (target, journey.last) {
            (Some(target), None) => Turn::Ask(target),
            (Some(target), Some(_)) => match self.budget.take(Instant::now()) {
                Ok(()) => Turn::Ask(target),
                Err(pause) => Turn::Wait(pause, journey.error()),
            },
            (None, Some(_)) if !is_resuming && !journey.loss_passes() => Turn::Never(journey.error()),
            (None, _) if pool.ready.any(|target| !target.may_go_on(begun_by)) => {
                Turn::Wait(ASK_AGAIN, Loss::Unlike.error())
            }
            (None, None) if pool.ready.any(|target| !record.ctx.may_go_to(&target.site)) => {
                Turn::Wait(ASK_AGAIN, nobody_at_site())
            }
            (None, _) => Turn::Wait(ASK_AGAIN, journey.error()),
        }
    }

    fn may_resume(&self, journey: &Journey) -> bool {
        self.rules.resumes_max > 0 && journey.delivered.is_complete() && !journey.began_abroad
    }
}

/// The tokens that the client has had are more than the edge remembers.
fn too_long() -> ApiError {
    let message = format!("the node was lost, and a stream of more than {TOKENS_MAX} tokens cannot go on at another");
    ApiError::new(ErrorKind::BadGateway, "stream_too_long", message)
}

/// Who asks is bound to sites, and nobody there takes requests.
fn nobody_at_site() -> ApiError {
    route::nobody_ready("no node is ready at the sites that requests of this credential may not leave")
}

/// No upstream of the model knows an API that is Tidegate's own.
fn not_abroad(generation: &Generation, model: &str) -> ApiError {
    let message = format!("'{model}' is served by upstreams that do not have {} here", generation.path);
    ApiError::new(ErrorKind::NotFound, "unknown_path", message)
}

impl Loss {
    /// Whether a request that has not begun should wait for it to pass. A client can come again when there is room, and what has failed
    /// everywhere would fail again.
    fn passes(self) -> bool {
        matches!(self, Self::Connect | Self::Busy | Self::Handover)
    }
}

impl Journey {
    /// What to say when nobody could go on.
    fn error(&self) -> ApiError {
        self.last.map_or_else(|| route::nobody_ready("no node is ready now"), Loss::error)
    }

    /// Whether it was to be remembered, and grew beyond that.
    fn is_too_long(&self) -> bool {
        self.delivered.total() > TOKENS_MAX
    }

    /// Whether waiting may help: a node that was known to be away can come back.
    fn loss_passes(&self) -> bool {
        self.last_was_suspect || self.last.is_none_or(Loss::passes) || self.waits_for_room()
    }

    /// The node that was lost last.
    fn last_asked(&self) -> &[NodeId] {
        self.tried.last().map(std::slice::from_ref).unwrap_or_default()
    }

    /// Whether the last node did not even begin.
    fn was_refused(&self) -> bool {
        matches!(self.last, Some(Loss::Busy | Loss::Full | Loss::Unlike))
    }
}
