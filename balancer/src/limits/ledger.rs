//! What everybody has used lately, in memory that the configuration bounds. Pure; time comes in.
//!
//! A tab whose buckets have drained and that holds no stream says nothing that a new one would not, so it goes: each charge looks at
//! two. When there are as many as may be all the same, the one goes that was not used since it was looked at last (second chance), and its
//! owner is counted anew: whoever commands more addresses than that is beyond a limit by addresses. Tabs that hold a stream stay, and are
//! no more than there are places for requests.

use std::{collections::HashMap, net::IpAddr, sync::Arc, time::Duration};

use super::{
    allowance::Left,
    quota::{Kind, Knob, Quota, Scope},
    rate::{Bucket, Rate},
};
use crate::auth::CredentialKind;

/// How many tabs are looked at for each charge, to let go of the idle ones.
const LOOKS: usize = 2;
/// When to come again for a place, which nobody can know.
const STREAM_WAIT: Duration = Duration::from_secs(1);

/// Whose use is counted together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Who {
    Key(CredentialKind, Arc<str>),
    Tenant(Arc<str>),
    Address(IpAddr),
    Everybody,
}

impl Who {
    pub(crate) fn scope(&self) -> Scope {
        match self {
            Self::Key(..) => Scope::Key,
            Self::Tenant(_) => Scope::Tenant,
            Self::Address(_) => Scope::Address,
            Self::Everybody => Scope::Total,
        }
    }
}

/// Who is to be charged, and how much they may have.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Charge {
    pub(crate) who: Who,
    pub(crate) quota: Quota,
    /// Whether the credential has limits of its own.
    pub(crate) is_own: bool,
}

impl Charge {
    /// One balancer's share of it; none where nothing is limited.
    pub(crate) fn share(self, balancers: usize) -> Option<Self> {
        (!self.quota.is_none()).then(|| Self { quota: self.quota.share_of(balancers), ..self })
    }

    pub(crate) fn over(&self, kind: Kind, wait: Duration) -> Over {
        Over { knob: Knob { scope: self.who.scope(), kind, is_own: self.is_own }, wait }
    }
}

/// What is asked for at once.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ask {
    pub(crate) requests: f64,
    pub(crate) tokens: f64,
    pub(crate) stream: bool,
}

impl Ask {
    /// What is charged: who wants more tokens than there are for it waits for all of those, and owes the rest when it is settled.
    fn at_most(self, quota: &Quota) -> Self {
        Self { tokens: quota.tokens.map_or(self.tokens, |rate| self.tokens.min(rate.burst)), ..self }
    }
}

/// A limit is met.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Over {
    pub(crate) knob: Knob,
    pub(crate) wait: Duration,
}

/// What one has used.
#[derive(Debug, Default)]
struct Tab {
    requests: Bucket,
    tokens: Bucket,
    streams: usize,
    /// When the buckets have drained.
    idle_at_s: f64,
    was_used: bool,
}

impl Tab {
    fn fits(&self, charge: &Charge, ask: Ask, now_s: f64) -> Result<(), Over> {
        let Quota { requests, tokens, streams } = charge.quota;
        let rated = |bucket: &Bucket, rate: Option<Rate>, cost: f64, kind| match rate {
            Some(rate) if cost > 0.0 => bucket.fits(rate, cost, now_s).map_err(|wait| charge.over(kind, wait)),
            _ => Ok(()),
        };
        rated(&self.requests, requests, ask.requests, Kind::Requests)?;
        rated(&self.tokens, tokens, ask.tokens, Kind::Tokens)?;
        match streams {
            Some(most) if ask.stream && self.streams >= most => Err(charge.over(Kind::Streams, STREAM_WAIT)),
            _ => Ok(()),
        }
    }

    fn add(&mut self, quota: &Quota, ask: Ask, now_s: f64) {
        for (bucket, rate, cost) in
            [(&mut self.requests, quota.requests, ask.requests), (&mut self.tokens, quota.tokens, ask.tokens)]
        {
            let Some(rate) = rate else { continue };
            bucket.add(rate, cost, now_s);
            self.idle_at_s = self.idle_at_s.max(now_s + bucket.drains_in(rate, now_s).as_secs_f64());
        }
        self.streams += usize::from(ask.stream);
        self.was_used = true;
    }

    fn is_idle(&self, now_s: f64) -> bool {
        self.streams == 0 && self.idle_at_s <= now_s
    }
}

/// All tabs.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    index: HashMap<Who, usize>,
    tabs: Vec<(Who, Tab)>,
    hand: usize,
}

impl Ledger {
    /// Charges all of `charges`, or none where one of them is over its limit.
    pub(crate) fn admit(&mut self, charges: &[Charge], ask: Ask, tabs_max: usize, now_s: f64) -> Result<(), Over> {
        self.look_around(LOOKS * charges.len(), now_s);
        for charge in charges {
            match self.tab(&charge.who) {
                Some(tab) => tab.fits(charge, ask, now_s)?,
                None => Tab::default().fits(charge, ask, now_s)?,
            }
        }
        for charge in charges {
            let ask = ask.at_most(&charge.quota);
            self.tab_or_new(&charge.who, tabs_max).add(&charge.quota, ask, now_s);
        }
        Ok(())
    }

    /// Adds to what `who` has used, or takes away from it, without a judgement.
    pub(crate) fn correct(&mut self, charge: &Charge, ask: Ask, tabs_max: usize, now_s: f64) {
        self.tab_or_new(&charge.who, tabs_max).add(&charge.quota, ask, now_s);
    }

    /// A stream has ended.
    pub(crate) fn leave(&mut self, who: &Who) {
        if let Some(&at) = self.index.get(who) {
            let tab = &mut self.tabs[at].1;
            tab.streams = tab.streams.saturating_sub(1);
        }
    }

    /// How much is left of one's rate of requests or tokens, if there is one.
    pub(crate) fn left(&self, charge: &Charge, kind: Kind, now_s: f64) -> Option<Left> {
        let rate = match kind {
            Kind::Requests => charge.quota.requests,
            Kind::Tokens => charge.quota.tokens,
            Kind::Streams => None,
        }?;
        let bucket = self.tab(&charge.who).map(|tab| if kind == Kind::Tokens { tab.tokens } else { tab.requests });
        let bucket = bucket.unwrap_or_default();
        Some(Left { limit: rate.burst, left: bucket.left(rate, now_s), reset: bucket.drains_in(rate, now_s) })
    }

    /// How many are counted now.
    pub(crate) fn len(&self) -> usize {
        self.tabs.len()
    }

    fn tab(&self, who: &Who) -> Option<&Tab> {
        self.index.get(who).map(|&at| &self.tabs[at].1)
    }

    fn tab_or_new(&mut self, who: &Who, tabs_max: usize) -> &mut Tab {
        let at = match self.index.get(who) {
            Some(&at) => at,
            None => {
                while self.tabs.len() >= tabs_max && self.evict() {}
                self.index.insert(who.clone(), self.tabs.len());
                self.tabs.push((who.clone(), Tab::default()));
                self.tabs.len() - 1
            }
        };
        &mut self.tabs[at].1
    }

    /// Lets go of idle tabs, a few at a time.
    fn look_around(&mut self, looks: usize, now_s: f64) {
        for _ in 0..looks.min(self.tabs.len()) {
            self.hand %= self.tabs.len();
            if self.tabs[self.hand].1.is_idle(now_s) {
                self.remove(self.hand);
            } else {
                self.hand += 1;
            }
            if self.tabs.is_empty() {
                return;
            }
        }
    }

    /// Lets go of one that holds no stream; says whether there was one.
    fn evict(&mut self) -> bool {
        for _ in 0..2 * self.tabs.len() {
            self.hand %= self.tabs.len();
            let tab = &mut self.tabs[self.hand].1;
            if tab.streams == 0 && !std::mem::take(&mut tab.was_used) {
                self.remove(self.hand);
                return true;
            }
            self.hand += 1;
        }
        false
    }

    fn remove(&mut self, at: usize) {
        let (who, _) = self.tabs.swap_remove(at);
        self.index.remove(&who);
        if let Some((moved, _)) = self.tabs.get(at) {
            self.index.insert(moved.clone(), at);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ONE: Ask = Ask { requests: 1.0, tokens: 0.0, stream: false };
    const STREAM: Ask = Ask { requests: 0.0, tokens: 0.0, stream: true };

    fn rate(per_second: f64, burst: f64) -> Option<Rate> {
        Some(Rate { per_second, burst })
    }

    fn charge(who: Who, quota: Quota) -> Charge {
        Charge { who, quota, is_own: false }
    }

    fn key(name: &str) -> Who {
        Who::Key(CredentialKind::Key, name.into())
    }

    #[test]
    fn who_is_over_one_limit_is_charged_for_none() {
        let quota = |burst| Quota { requests: rate(1.0, burst), ..Quota::default() };
        let charges = [charge(key("k"), quota(1.0)), charge(Who::Everybody, quota(10.0))];
        let mut ledger = Ledger::default();
        assert_eq!(ledger.admit(&charges, ONE, 100, 0.0), Ok(()));
        let over = ledger.admit(&charges, ONE, 100, 0.0).unwrap_err();
        assert_eq!((over.knob.scope, over.knob.kind), (Scope::Key, Kind::Requests));
        assert_eq!(ledger.left(&charges[1], Kind::Requests, 0.0).unwrap().left, 9.0);
        let wait = over.wait.as_secs_f64();
        assert_eq!(ledger.admit(&charges, ONE, 100, wait), Ok(()));
    }

    #[test]
    fn streams_are_counted_until_they_end() {
        let charges = [charge(key("k"), Quota { streams: Some(2), ..Quota::default() })];
        let mut ledger = Ledger::default();
        assert!((0..2).all(|_| ledger.admit(&charges, STREAM, 100, 0.0).is_ok()));
        let over = ledger.admit(&charges, STREAM, 100, 0.0).unwrap_err();
        assert_eq!((over.knob.kind, over.wait), (Kind::Streams, STREAM_WAIT));
        assert_eq!(ledger.admit(&charges, ONE, 100, 0.0), Ok(()));
        ledger.leave(&charges[0].who);
        assert_eq!(ledger.admit(&charges, STREAM, 100, 0.0), Ok(()));
    }

    #[test]
    fn a_limit_that_is_changed_finds_what_was_used_before() {
        let of = |burst| [charge(key("k"), Quota { requests: rate(1.0, burst), ..Quota::default() })];
        let mut ledger = Ledger::default();
        assert!((0..5).all(|_| ledger.admit(&of(5.0), ONE, 100, 0.0).is_ok()));
        assert!(ledger.admit(&of(3.0), ONE, 100, 2.0).is_err());
        assert_eq!(ledger.admit(&of(9.0), ONE, 100, 2.0), Ok(()));
        assert_eq!(ledger.left(&of(9.0)[0], Kind::Requests, 2.0).unwrap().left, 5.0);
    }

    #[test]
    fn idle_tabs_go_and_those_that_hold_a_stream_stay() {
        let quota = Quota { requests: rate(1.0, 1.0), streams: Some(9), ..Quota::default() };
        let mut ledger = Ledger::default();
        ledger.admit(&[charge(key("held"), quota)], STREAM, 100, 0.0).unwrap();
        for i in 0..50 {
            ledger.admit(&[charge(key(&i.to_string()), quota)], ONE, 100, 0.0).unwrap();
        }
        assert_eq!(ledger.len(), 51);
        for _ in 0..60 {
            ledger.admit(&[charge(key("new"), quota)], STREAM, 100, 10.0).unwrap_or_default();
        }
        assert_eq!(ledger.len(), 2);
        assert!(ledger.tab(&key("held")).is_some());
    }

    #[test]
    fn a_flood_of_names_is_bounded_and_takes_no_stream_away() {
        let quota = Quota { requests: rate(0.001, 1.0), streams: Some(1), ..Quota::default() };
        let mut ledger = Ledger::default();
        let held = [charge(key("held"), quota)];
        ledger.admit(&held, STREAM, 16, 0.0).unwrap();
        for i in 0..1000 {
            ledger.admit(&[charge(key(&i.to_string()), quota)], ONE, 16, 0.0).unwrap();
            assert!(ledger.len() <= 16);
        }
        assert!(ledger.admit(&held, STREAM, 16, 0.0).is_err());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Admit(usize, bool),
        Leave(usize),
        Pass(f64),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..6usize, any::<bool>()).prop_map(|(i, stream)| Step::Admit(i, stream)),
            (0..6usize).prop_map(Step::Leave),
            (0.0..2.0f64).prop_map(Step::Pass),
        ]
    }

    proptest! {
        /// Law: whatever comes and goes, nobody has more streams than may be, their count is exact, and the index finds every tab.
        #[test]
        fn counts_stay_exact(steps in prop::collection::vec(any_step(), 0..300), tabs_max in 1usize..8) {
            let quota = Quota { requests: rate(2.0, 3.0), streams: Some(2), ..Quota::default() };
            let (mut ledger, mut open, mut now_s, mut holders_most) = (Ledger::default(), [0usize; 6], 0.0, 0);
            for step in steps {
                match step {
                    Step::Pass(s) => now_s += s,
                    Step::Admit(i, stream) => {
                        let ask = Ask { requests: 1.0, tokens: 0.0, stream };
                        if ledger.admit(&[charge(key(&i.to_string()), quota)], ask, tabs_max, now_s).is_ok() {
                            open[i] += usize::from(stream);
                        }
                        prop_assert!(open[i] <= 2);
                    }
                    Step::Leave(i) if open[i] > 0 => {
                        open[i] -= 1;
                        ledger.leave(&key(&i.to_string()));
                    }
                    Step::Leave(_) => {}
                }
                holders_most = open.iter().filter(|n| **n > 0).count().max(holders_most);
                prop_assert!(ledger.len() <= tabs_max.max(holders_most + 1));
                prop_assert_eq!(ledger.index.len(), ledger.tabs.len());
                for (at, (who, tab)) in ledger.tabs.iter().enumerate() {
                    prop_assert_eq!(ledger.index[who], at);
                    let Who::Key(_, name) = who else { unreachable!() };
                    prop_assert_eq!(tab.streams, open[name.parse::<usize>().unwrap()]);
                }
                for (i, open) in open.iter().enumerate().filter(|(_, open)| **open > 0) {
                    prop_assert!(ledger.tab(&key(&i.to_string())).is_some_and(|tab| tab.streams == *open));
                }
            }
        }
    }
}
