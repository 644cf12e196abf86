//! The `isobar` command. `main` alone turns errors into exit codes: 0 done, 1 the thing asked for failed, 2 usage or
//! configuration.

mod bench;
mod ca;
mod call;
mod caller;
mod check;
mod credentials;
mod demo;
mod join;
mod load;
mod log;
mod node;
mod openai;
mod output;
mod parent;
mod schema;
mod setup;
mod sim;
mod status;
mod target;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Many small things of many sizes come and go at once, in a node as in a simulation.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// A QUIC-native RPC service-mesh node for inference fleets.
#[derive(Debug, Parser)]
#[command(name = "isobar", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what a mesh is good for: three regions on this machine, in one command
    Demo(demo::Options),
    /// Run a node
    Node(node::Options),
    /// Find what is wrong with a node, its machine and its way to the others
    Check(check::Options),
    /// Make this machine a node of a mesh, with a token
    Join(join::Options),
    /// Show what the mesh looks like from a node
    Status(status::Options),
    /// Call a method of any gRPC server, with JSON in and out
    Call(call::Options),
    /// Put load on a server, and say how it bore it
    Bench(bench::Options),
    /// Make and use certificate authorities
    Ca(ca::Options),
    /// Run simulations
    Sim(sim::Options),
    /// Print the JSON schema of the configuration file
    Schema,
}

/// Why a command did not do what it was asked.
#[derive(Debug)]
enum Failure {
    /// The thing asked for failed.
    Failed(anyhow::Error),
    /// The thing asked for failed, and what was printed says so.
    Said,
    /// Usage or configuration: the user can mend it.
    Usage(anyhow::Error),
}

impl Failure {
    fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self::Usage(error.into())
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

fn main() -> ExitCode {
    // clap prints its own errors and exits with 2.
    let outcome = match Cli::parse().command {
        Command::Demo(options) => demo::run(&options),
        Command::Node(options) => node::run(&options),
        Command::Check(options) => check::run(&options),
        Command::Join(options) => join::run(&options),
        Command::Status(options) => status::run(&options),
        Command::Call(options) => call::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Ca(options) => ca::run(&options),
        Command::Sim(options) => sim::run(&options),
        Command::Schema => output::json(&::node::config::json_schema()).map_err(Failure::from),
    };
    let (error, code) = match outcome {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Said) => return ExitCode::FAILURE,
        Err(Failure::Failed(error)) => (error, 1),
        Err(Failure::Usage(error)) => (error, 2),
    };
    output::error(&error);
    ExitCode::from(code)
}
