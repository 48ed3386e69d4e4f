//! What an answer says of the limits that it came under, in the headers that clients of OpenAI's API read.

use std::time::Duration;

use super::{
    ledger::{Charge, Ledger},
    quota::{Kind, Scope},
    rate::{self, Rate},
};

/// How much of one limit is left.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Left {
    pub(crate) limit: f64,
    pub(crate) left: f64,
    /// Until nothing of it is used any more.
    pub(crate) reset: Duration,
}

/// What is left to who asks, of the limit of each kind that leaves least.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Allowance {
    requests: Option<Left>,
    tokens: Option<Left>,
}

impl Allowance {
    /// What `ledger` leaves to those that are charged. How much all clients together have used is nobody's business.
    pub(super) fn of(ledger: &Ledger, charges: &[Charge], now_s: f64) -> Self {
        let least = |kind| {
            let own = charges.iter().filter(|charge| charge.who.scope() != Scope::Total);
            own.filter_map(|charge| ledger.left(charge, kind, now_s)).reduce(tighter)
        };
        Self { requests: least(Kind::Requests), tokens: least(Kind::Tokens) }
    }

    /// The same where it was counted elsewhere: what each has used of requests and tokens.
    pub(super) fn of_used(charges: &[Charge], used: &[[f64; 2]]) -> Self {
        let least = |kind: usize, rate_of: fn(&Charge) -> Option<Rate>| {
            let own = charges.iter().zip(used).filter(|(charge, _)| charge.who.scope() != Scope::Total);
            own.filter_map(|(charge, used)| {
                let (rate, used) = (rate_of(charge)?, used[kind]);
                let left = (rate.burst - used).max(0.0);
                Some(Left { limit: rate.burst, left, reset: rate::seconds(used / rate.per_second) })
            })
            .reduce(tighter)
        };
        Self { requests: least(0, |charge| charge.quota.requests), tokens: least(1, |charge| charge.quota.tokens) }
    }

    /// The tighter ones of both.
    pub(super) fn and(self, earlier: Option<Box<Self>>) -> Option<Box<Self>> {
        let earlier = earlier.map(|earlier| *earlier).unwrap_or_default();
        let both = |now: Option<Left>, then: Option<Left>| now.into_iter().chain(then).reduce(tighter);
        let all = Self { requests: both(self.requests, earlier.requests), tokens: both(self.tokens, earlier.tokens) };
        (all != Self::default()).then(|| Box::new(all))
    }

    /// Names and values of the headers.
    pub(crate) fn headers(&self) -> impl Iterator<Item = (&'static str, String)> {
        const REQUESTS: [&str; 3] =
            ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"];
        const TOKENS: [&str; 3] =
            ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"];
        let of = |names: [&'static str; 3], left: Option<Left>| {
            let values = left.map(|left| [whole(left.limit), whole(left.left), clock(left.reset)]);
            values.into_iter().flat_map(move |values| names.into_iter().zip(values))
        };
        of(REQUESTS, self.requests).chain(of(TOKENS, self.tokens))
    }
}

fn tighter(a: Left, b: Left) -> Left {
    if b.left < a.left { b } else { a }
}

fn whole(amount: f64) -> String {
    // what is a hair below a whole one is that one, less the rounding
    format!("{}", (amount + 1e-6).floor() as u64)
}

/// A time as OpenAI writes it: `17ms`, `2.5s`, `6m0s`, `1h2m3s`.
fn clock(time: Duration) -> String {
    let ms = time.as_micros().div_ceil(1000) as u64;
    let (h, m, s) = (ms / 3_600_000, ms / 60_000 % 60, ms % 60_000);
    match (h, m) {
        (0, 0) if s < 1000 => format!("{s}ms"),
        (0, 0) => format!("{}s", s as f64 / 1e3),
        (0, _) => format!("{m}m{}s", s.div_ceil(1000)),
        (_, _) => format!("{h}h{m}m{}s", s.div_ceil(1000)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_as_openais() {
        for (ms, text) in
            [(0, "0ms"), (17, "17ms"), (2500, "2.5s"), (60_000, "1m0s"), (61_001, "1m2s"), (3_723_000, "1h2m3s")]
        {
            assert_eq!(clock(Duration::from_millis(ms)), text);
        }
    }

    #[test]
    fn the_tighter_limit_is_told() {
        let left = |limit, left| Some(Left { limit, left, reset: Duration::from_secs(1) });
        let address = Allowance { requests: left(5.0, 1.0), tokens: None };
        let key = Allowance { requests: left(9.0, 4.0), tokens: left(600.0, 12.9) };
        let both = key.and(Some(Box::new(address))).unwrap();
        let headers: Vec<String> = both.headers().map(|(name, value)| format!("{name}: {value}")).collect();
        assert_eq!(
            headers,
            [
                "x-ratelimit-limit-requests: 5",
                "x-ratelimit-remaining-requests: 1",
                "x-ratelimit-reset-requests: 1s",
                "x-ratelimit-limit-tokens: 600",
                "x-ratelimit-remaining-tokens: 12",
                "x-ratelimit-reset-tokens: 1s",
            ]
        );
        assert_eq!(Allowance::default().and(None), None);
    }
}
