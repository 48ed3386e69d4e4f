//! The edge of a Tidegate cluster: it takes requests from the network and carries each stream to its end, whatever happens to nodes.
//!
//! The modules stand in the order in which a request meets them:
//!
//! `bind` takes the sockets before anything else runs. A connection is judged by its address in `accept`, that of its client
//! behind a proxy in `proxied`, and secured in `tls` with the certificate that `names` finds; `serve` reads its requests one after another; `strict` refuses what HTTP could mean in two ways. Each request gets its state in `ctx`,
//! shows its credential in `auth`, is judged by `policy`, takes its place in `limits`, is told in `body` and `route` which model it wants,
//! goes on with the dialogue that `sessions` remembers, is answered by `cache` if it was before, and
//! is carried by `relay` to the node that `pick` chose, and on to the next when that one is lost. `answer` writes what the edge says itself, and `record` makes
//! exactly one terminal record of it all, which `journal` shows as a trace and `audit` keeps where the configuration names a folder.
//!
//! Beside the request: `discover` follows the registry, or what is `remembered` of it, and `health` probes each member; both feed `pool`,
//! whose one writer publishes immutable snapshots; `upstreams` are the members that are none of ours. `live` is the configuration in force,
//! which a reload replaces. `metrics` counts, `admin` shows it on a private listener, `drain` waits for open requests at the end, `upgrade`
//! gives the sockets to the process that comes next.
//!
//! Pingora carries the connections: its listeners, connection filter, HTTP/1.1 and HTTP/2 sessions and its pooled connector. Its
//! `Server` and `HttpProxy` are left out on purpose: the first ends after a fixed sleep instead of when the last stream has ended,
//! the second reads a request's head without a total deadline and answers a broken one in its own words.

mod config;
mod bind;
mod run;
mod live;
mod accept;
mod proxied;
mod tls;
mod names;
mod serve;
mod strict;
mod ctx;
pub mod auth;
mod pattern;
pub mod policy;
mod limits;
mod body;
mod sessions;
mod cache;
mod route;
mod pick;
mod relay;
mod answer;
mod record;
mod journal;
pub mod audit;
mod discover;
mod remembered;
mod health;
mod upstreams;
mod pool;
mod metrics;
pub mod admin;
mod drain;
mod upgrade;
#[cfg(fuzzing)]
pub mod fuzz;

pub use bind::Balancer;
pub use config::BalancerConfig;
pub use live::Reloads;
pub use run::{RunError, run};
