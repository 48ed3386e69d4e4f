//! The life of one member as one enum and one transition function. Pure: no clock, no I/O, no knowledge of other members.
//!
//! `Joining → Ready ⇄ Ejected → Draining → Gone`. A member leaves only when the registry no longer lists it and it does not answer or
//! says that it drains; a registry that forgot it changes nothing while its probes pass.

use serde::{Deserialize, Serialize};

use super::Rules;

/// Where a member stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// New, not yet proven.
    Joining { successes: u32 },
    /// Takes requests.
    Ready { failures: u32 },
    /// Was ready and is not.
    Ejected { successes: u32 },
    /// Finishes what it has.
    Draining,
    /// Has left; the member is dropped.
    Gone,
}

/// A state without its counters, as the private listener shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// New, not yet proven.
    Joining,
    /// Takes requests.
    Ready,
    /// Was ready and is not.
    Ejected,
    /// Finishes what it has.
    Draining,
    /// Has left.
    Gone,
}

impl Phase {
    /// The word in logs, JSON and labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Joining => "joining",
            Self::Ready => "ready",
            Self::Ejected => "ejected",
            Self::Draining => "draining",
            Self::Gone => "gone",
        }
    }
}

/// What can happen to a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// A probe was answered: healthy.
    Healthy,
    /// A probe was answered: loading or stalled.
    Unready,
    /// A probe was answered: draining.
    Draining,
    /// A probe was not answered.
    Failed,
    /// A request could not reach the member or heard nothing from it.
    Missed {
        /// Whether its pool would be empty without it.
        last_ready: bool,
    },
    /// The registry no longer lists it.
    Unlisted,
}

impl State {
    /// The state after `event`, for a member that the registry lists or not.
    pub(crate) fn next(self, event: Event, listed: bool, rules: Rules) -> Self {
        match (self, event) {
            (Self::Gone, _) => Self::Gone,
            (Self::Draining, Event::Unlisted) => Self::Gone,
            (state, Event::Unlisted) => state,
            (state, Event::Healthy) => state.proven(rules.up),
            (state, Event::Unready) => state.unready(),
            (_, Event::Draining) if listed => Self::Draining,
            (_, Event::Draining) => Self::Gone,
            (state, Event::Failed) => state.failed(listed, rules.down),
            (Self::Ready { failures }, Event::Missed { last_ready: true }) => {
                Self::Ready { failures: (failures + 1).min(rules.down - 1) }
            }
            (Self::Ready { failures }, Event::Missed { last_ready: false }) => Self::missed(failures, rules.down),
            (state, Event::Missed { .. }) => state,
        }
    }

    fn proven(self, up: u32) -> Self {
        let enough = |successes| successes >= up;
        match self {
            Self::Ready { .. } => Self::Ready { failures: 0 },
            Self::Joining { successes } | Self::Ejected { successes } if enough(successes + 1) => {
                Self::Ready { failures: 0 }
            }
            Self::Joining { successes } => Self::Joining { successes: successes + 1 },
            Self::Ejected { successes } => Self::Ejected { successes: successes + 1 },
            Self::Draining if enough(1) => Self::Ready { failures: 0 },
            Self::Draining => Self::Joining { successes: 1 },
            Self::Gone => Self::Gone,
        }
    }

    fn unready(self) -> Self {
        match self {
            Self::Joining { .. } | Self::Draining => Self::Joining { successes: 0 },
            Self::Ready { .. } | Self::Ejected { .. } => Self::Ejected { successes: 0 },
            Self::Gone => Self::Gone,
        }
    }

    fn failed(self, listed: bool, down: u32) -> Self {
        match self {
            Self::Ready { failures } => match Self::missed(failures, down) {
                Self::Ejected { .. } if !listed => Self::Gone,
                state => state,
            },
            _ if !listed => Self::Gone,
            Self::Joining { .. } => Self::Joining { successes: 0 },
            _ => Self::Ejected { successes: 0 },
        }
    }

    fn missed(failures: u32, down: u32) -> Self {
        if failures + 1 >= down { Self::Ejected { successes: 0 } } else { Self::Ready { failures: failures + 1 } }
    }

    /// Whether requests may go there.
    pub(crate) fn is_ready(self) -> bool {
        matches!(self, Self::Ready { .. })
    }

    /// Whether the next probe should come soon, because it may decide something.
    pub(crate) fn is_undecided(self) -> bool {
        match self {
            Self::Joining { .. } => true,
            Self::Ready { failures } => failures > 0,
            Self::Ejected { successes } => successes > 0,
            Self::Draining | Self::Gone => false,
        }
    }

    /// The state without its counters.
    pub(crate) fn phase(self) -> Phase {
        match self {
            Self::Joining { .. } => Phase::Joining,
            Self::Ready { .. } => Phase::Ready,
            Self::Ejected { .. } => Phase::Ejected,
            Self::Draining => Phase::Draining,
            Self::Gone => Phase::Gone,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULES: Rules = Rules { up: 2, down: 3, slow_start: std::time::Duration::ZERO, panic_percent: 50 };
    const NEW: State = State::Joining { successes: 0 };

    fn run(state: State, events: &[Event], listed: bool) -> State {
        events.iter().fold(state, |state, event| state.next(*event, listed, RULES))
    }

    #[test]
    fn two_successes_admit_and_three_failures_eject() {
        use Event::{Failed, Healthy};
        assert!(!run(NEW, &[Healthy], true).is_ready());
        assert!(run(NEW, &[Healthy, Healthy], true).is_ready());
        assert!(!run(NEW, &[Healthy, Failed, Healthy], true).is_ready());
        let ready = State::Ready { failures: 0 };
        assert!(run(ready, &[Failed, Failed, Healthy, Failed, Failed], true).is_ready());
        let ejected = run(ready, &[Failed; 3], true);
        assert_eq!(ejected, State::Ejected { successes: 0 });
        assert!(run(ejected, &[Healthy, Healthy], true).is_ready());
    }

    #[test]
    fn what_a_node_says_of_itself_is_honoured_at_once() {
        let ready = State::Ready { failures: 0 };
        assert_eq!(run(ready, &[Event::Unready], true).phase(), Phase::Ejected);
        assert_eq!(run(ready, &[Event::Draining], true).phase(), Phase::Draining);
        assert_eq!(run(ready, &[Event::Draining], false), State::Gone);
        assert_eq!(run(State::Draining, &[Event::Unlisted], false), State::Gone);
        assert_eq!(run(State::Draining, &[Event::Healthy], true).phase(), Phase::Joining);
    }

    #[test]
    fn passive_signals_eject_but_never_the_last() {
        let ready = State::Ready { failures: 0 };
        assert_eq!(run(ready, &[Event::Missed { last_ready: false }; 3], true).phase(), Phase::Ejected);
        let kept = run(ready, &[Event::Missed { last_ready: true }; 50], true);
        assert!(kept.is_ready());
        assert_eq!(kept.next(Event::Failed, true, RULES).phase(), Phase::Ejected);
    }

    fn any_event() -> impl Strategy<Value = Event> {
        prop_oneof![
            Just(Event::Healthy),
            Just(Event::Unready),
            Just(Event::Draining),
            Just(Event::Failed),
            any::<bool>().prop_map(|last_ready| Event::Missed { last_ready }),
            Just(Event::Unlisted),
        ]
    }

    proptest! {
        #[test]
        fn a_listed_member_never_leaves(events in prop::collection::vec(any_event(), 0..60)) {
            let events: Vec<Event> = events.into_iter().filter(|e| *e != Event::Unlisted).collect();
            prop_assert_ne!(run(NEW, &events, true), State::Gone);
        }

        #[test]
        fn a_forgotten_member_stays_while_it_answers(passes in 0usize..60) {
            let ready = State::Ready { failures: 0 }.next(Event::Unlisted, false, RULES);
            prop_assert!(run(ready, &vec![Event::Healthy; passes], false).is_ready());
        }

        #[test]
        fn a_forgotten_member_that_does_not_answer_leaves(events in prop::collection::vec(any_event(), 0..20)) {
            let failing = [Event::Failed; 3];
            prop_assert_eq!(run(run(NEW, &events, false), &failing, false), State::Gone);
        }
    }
}
