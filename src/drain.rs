//! `tidegate drain` and `undrain`: a node stops taking requests without stopping, and takes them again.
//!
//! With etcd the order is a key there, which the node reads wherever it runs, and again after a restart. Otherwise, or when etcd is away,
//! the node's private listener takes it, for as long as the node's process lives.

use std::{net::SocketAddr, time::Duration};

use tidegate_common::{
    config::ClusterConfig,
    ids::NodeId,
    registry::{self, OrderError, Ordered},
};
use tidegate_node::admin::{self, DrainRequest, Drained};

use crate::{
    exit::Failure,
    private,
    settings::{self, ConfigFile},
};

/// Longer than the node itself waits.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Which node, and by which road it is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The node's id
    node: NodeId,
    #[command(flatten)]
    file: ConfigFile,
    /// Tell the node itself, at its private listener (node.admin.listen), and not through etcd: it holds until the node's process ends
    #[arg(long, value_name = "ADDR")]
    admin: Option<SocketAddr>,
}

/// What the node is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    Drain,
    Undrain,
}

pub(crate) fn run(order: Order, args: &Args) -> Result<(), Failure> {
    let line = match args.admin {
        Some(admin) => directly(order, &args.node, admin)?,
        None => through_etcd(order, args)?,
    };
    println!("{line}");
    Ok(())
}

fn directly(order: Order, node: &NodeId, admin: SocketAddr) -> Result<String, Failure> {
    let path = if order == Order::Drain { admin::DRAIN } else { admin::UNDRAIN };
    let request = DrainRequest { node: node.clone() };
    let (_, Drained { already, running }) = private::ask_node(admin, TIMEOUT, path, Some(&request))?;
    Ok(match (order, already, running) {
        (order, true, _) => had_been(order, node),
        (Order::Drain, false, 0) => format!("{node} is drained: it takes no requests, and none runs there"),
        (Order::Drain, false, _) => {
            format!("{node} takes no new requests; {running} run on for at most its node.drain_grace")
        }
        (Order::Undrain, false, _) => format!("{node} takes requests"),
    })
}

fn through_etcd(order: Order, args: &Args) -> Result<String, Failure> {
    let cluster = args.file.read()?.check(|r| {
        for section in ["balancer", "node", "log"] {
            settings::leave_to_others(r, section);
        }
        ClusterConfig::read(r)
    })?;
    let node = &args.node;
    let done = private::runtime()?.block_on(registry::order(&cluster, node, order == Order::Drain));
    Ok(match (order, done.map_err(refused)?) {
        (order, Ordered::Already) => had_been(order, node),
        (Order::Drain, Ordered::Obeyed) => {
            format!("{node} takes no new requests; what runs there ends, or moves on after its node.drain_grace")
        }
        (Order::Drain, Ordered::Noted) => {
            format!("{node} is to be drained: this stands in etcd, and the node has not withdrawn yet")
        }
        (Order::Undrain, Ordered::Obeyed) => format!("{node} takes requests"),
        (Order::Undrain, Ordered::Noted) => {
            format!("{node} is not to be drained any more; it has not announced itself yet, so it may not be running")
        }
    })
}

fn had_been(order: Order, node: &NodeId) -> String {
    match order {
        Order::Drain => format!("{node} is drained already"),
        Order::Undrain => format!("{node} is not drained"),
    }
}

fn refused(error: OrderError) -> Failure {
    match error {
        OrderError::Unknown { .. } => Failure::usage(error.to_string()),
        OrderError::NoStore => Failure::usage(format!(
            "{error}\n  fix: name the cluster's file with --config, or on the node's machine its private listener with --admin"
        )),
        OrderError::OutOfReach(_) => Failure::unavailable(format!(
            "{error}\n  fix: start etcd, or on the node's machine name its private listener with --admin"
        )),
        OrderError::Open(error) => error.into(),
    }
}
