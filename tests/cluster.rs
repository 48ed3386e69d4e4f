//! Whole-cluster tests: real processes of the `tidegate` command, a real model, real etcd, real TLS, the official OpenAI client.
//!
//! All files are one test program, so that it is linked once. Each file opens with what it shows and how. nextest runs these one at a
//! time (`.config/nextest.toml`): each of them loads the whole machine.

#![allow(clippy::unwrap_used)] // clippy's leave for tests does not reach their helpers
#![allow(clippy::print_stdout)] // the figures of a run are read by people

mod support;

mod config;
mod up;
mod allowlist;
mod limits;
mod mtls;
mod ca;
mod reload;
mod credentials;
mod upgrade;
mod audit;
mod trace;
mod failover;
mod alike;
mod foreign;
mod faults;
mod hosts;
mod batching;
mod fair;
mod models;
mod deadline;
mod drain;
mod api;
mod bad_input;
mod golden;
mod invariance;
mod speculation;
mod metrics;
mod sdk;
