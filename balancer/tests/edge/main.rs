//! The edge on real sockets: `run` on loopback ports, small fake nodes that speak the wire, the memory registry.
//!
//! Nothing here sleeps to wait for something; what can be awaited is, and the rest is asked for again until a bound.

// clippy.toml allows it in test functions only, and all of this crate is test
#![allow(clippy::unwrap_used)]

#[path = "../../../common/tests/support/collector.rs"]
mod collector;
mod support;
mod requests;
mod proxied;
mod auth;
mod tokens;
mod sessions;
mod cache;
mod relay;
mod foreign;
mod pool;
mod transport;
mod audit;
mod limits;
mod strict;
mod shared;
mod trace;
