//! How much: what a client may make the edge hold and do, and what it is told when that is reached.
//!
//! `intake` bounds one request's head and body, `places` all requests at once. `quota` is how much each key, tenant, address and everybody
//! together may have, `rate` the arithmetic of it, `ledger` who has used what, `shared` the same of
//! several balancers together. An `account` is one request's: it takes what the request
//! needs and gives back what is left, by `Drop` where it must. `allowance` tells clients what they have left. `doors` are before all that:
//! how many connections there may be, how fast they may come, and how often one may take its requests back.

mod intake;
mod places;
mod quota;
mod rate;
mod ledger;
mod shared;
mod account;
mod allowance;
mod doors;

pub(crate) use account::{Account, Limits, Rules};
pub(crate) use allowance::Allowance;
pub(crate) use doors::{Doors, DoorsConfig};
pub(crate) use intake::{BodyError, check_head, linger, read_body};
pub(crate) use places::Places;
pub(crate) use quota::Quotas;
pub(crate) use shared::Shared;
