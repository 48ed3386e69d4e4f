//! `tidegate policy`: asks the policies of a configuration what they would say.

use std::net::IpAddr;

use tidegate_balancer::{BalancerConfig, policy::Who};
use tidegate_common::config::{ClusterConfig, LogConfig};

use crate::{
    exit::Failure,
    settings::{self, ConfigFile},
};

/// Ask who may do what, and why
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Say whether a request would be allowed, and by which policy; the exit code is 77 where it is not
    #[command(
        after_help = "Actions are inference:chat, inference:completions, inference:embeddings, inference:tokenize, models:list, docs:read, \
metrics:read and members:read. Resources are model:NAME for inference and path:PATH for the rest. An API key is looked up in the \
configuration's file of keys, and what the key itself allows counts too.\n\n\
Examples:\n  tidegate policy test --config cluster.toml --as owner:alice --action inference:chat --resource model:smollm2-135m\n  \
tidegate policy test --config cluster.toml --as key:k-1f2e3d4c --from 10.0.0.7 --action metrics:read --resource path:/metrics"
    )]
    Test {
        #[command(flatten)]
        file: ConfigFile,
        /// Who asks: owner:NAME, key:ID, token:ID, oidc:ID, certificate:NAME or role:NAME; as often as there are any
        #[arg(long = "as", value_name = "WHO")]
        names: Vec<String>,
        /// Where the request comes from
        #[arg(long, value_name = "ADDRESS")]
        from: Option<IpAddr>,
        /// What it does
        #[arg(long)]
        action: String,
        /// What to
        #[arg(long)]
        resource: String,
    },
}

pub(crate) fn run(command: Command) -> Result<(), Failure> {
    let Command::Test { file, names, from, action, resource } = command;
    let config = file.read()?.check(|root| {
        settings::leave_to_others(root, "node");
        // read, so that what stands there is no unknown section
        drop((ClusterConfig::read(root), LogConfig::read(root)));
        BalancerConfig::read(root)
    })?;
    let decision = config.decide(Who { names, address: from }, &action, &resource);
    println!("{decision}");
    if decision.is_allowed() { Ok(()) } else { Err(Failure::denied(format!("{action} on {resource}: {decision}"))) }
}
