//! The `tidegate` command. It reads what the user wants, hands it to the balancer, the node or the model store, and says in the exit
//! code and in one message what became of it. No logic of either server lives here.
#![allow(clippy::print_stdout, reason = "a command answers its user on standard output")]

mod up;
mod balancer;
mod node;
mod check;
mod model;
mod status;
mod drain;
mod key;
mod token;
mod policy;
mod ca;
mod audit;
mod settings;
mod private;
mod reload;
mod signals;
mod progress;
mod exit;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use exit::Failure;

const AFTER_HELP: &str = "\
Examples:
  tidegate up                                   a balancer and two nodes on this machine, nothing else needed
  tidegate up --nodes 1 --model ./my.gguf       the same with one node and a model of your own
  tidegate check --config cluster.toml          every problem of a configuration, each with its fix
  tidegate node --config cluster.toml --id n1   one inference node
  tidegate balancer --config cluster.toml       the edge in front of the nodes
  tidegate status                               a table of the running cluster
  tidegate audit verify --config cluster.toml   whether the balancer's audit log is whole
  tidegate drain n1 --config cluster.toml       node n1 takes no new requests; `tidegate undrain n1` takes that back

Every value of the configuration file can also come from the environment: TIDEGATE__BALANCER__LISTEN sets balancer.listen.
Flags go over the environment, the environment goes over the file.

Exit codes:
  0   done
  64  the configuration or the arguments are wrong
  69  something needed is out of reach: a port in use, a model that cannot be had, a service that does not answer
  70  a fault of tidegate itself
  77  what `tidegate policy test` was asked about is not allowed";

const DRAIN_HELP: &str = "\
With cluster.registry.kind = \"etcd\" the order stands in etcd until it is taken back, so it holds over restarts of the node. Otherwise tell
the node itself with --admin.

Examples:
  tidegate drain n1 --config cluster.toml
  tidegate undrain n1 --config cluster.toml
  tidegate drain n1 --admin 127.0.0.1:18801";

/// An edge load balancer and a cluster of LLM inference nodes in one binary.
#[derive(Debug, Parser)]
#[command(name = "tidegate", version, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Up(up::Args),
    Balancer(balancer::Args),
    Node(node::Args),
    Check(check::Args),
    #[command(subcommand)]
    Model(model::Command),
    Status(status::Args),
    /// Have a node take no new requests, without stopping it; what runs there ends or moves to other nodes
    #[command(after_help = DRAIN_HELP)]
    Drain(drain::Args),
    /// Have a drained node take requests again
    #[command(after_help = DRAIN_HELP)]
    Undrain(drain::Args),
    #[command(subcommand)]
    Key(key::Command),
    #[command(subcommand)]
    Token(token::Command),
    #[command(subcommand)]
    Policy(policy::Command),
    #[command(subcommand)]
    Ca(ca::Command),
    #[command(subcommand)]
    Audit(audit::Command),
}

impl Command {
    fn run(self) -> Result<(), Failure> {
        match self {
            Self::Up(args) => up::run(args),
            Self::Balancer(args) => balancer::run(args),
            Self::Node(args) => node::run(args),
            Self::Check(args) => check::run(&args),
            Self::Model(command) => model::run(command),
            Self::Status(args) => status::run(&args),
            Self::Drain(args) => drain::run(drain::Order::Drain, &args),
            Self::Undrain(args) => drain::run(drain::Order::Undrain, &args),
            Self::Key(command) => key::run(command),
            Self::Token(command) => token::run(command),
            Self::Policy(command) => policy::run(command),
            Self::Ca(command) => ca::run(command),
            Self::Audit(command) => audit::run(command),
        }
    }
}

fn main() -> ExitCode {
    tidegate_common::tls::install_provider();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(refusal) => return exit::refused_arguments(&refusal),
    };
    match cli.command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_example_of_the_help_is_a_valid_command() {
        for line in AFTER_HELP.lines().filter_map(|line| line.strip_prefix("  tidegate ")) {
            let words = line.split("   ").next().unwrap_or_default().split_whitespace();
            if let Err(e) = Cli::try_parse_from(std::iter::once("tidegate").chain(words)) {
                panic!("{line}: {e}");
            }
        }
    }
}
