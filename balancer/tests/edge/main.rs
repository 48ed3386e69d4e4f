//! The edge on real sockets: `run` on loopback ports, small fake nodes that speak the wire, the memory registry.
//!
//! Nothing here sleeps to wait for something; what can be awaited is, and the rest is asked for again until a bound.

mod support;
mod requests;
mod relay;
mod pool;
mod transport;
