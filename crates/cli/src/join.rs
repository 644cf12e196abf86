//! `isobar join`: makes this machine a node of a mesh, with a token from an operator of it.
//!
//! The key is made here and stays here. The token names the mesh's root, so the authority is known for certain before
//! anything is said to it.

use std::{
    fs,
    io::{ErrorKind, Write as _},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::Context as _;
use base::{NodeName, clock};
use clap::Args;
use http::uri::Authority;
use identity::{IdentityFiles, NodeIdentity, Token};
use node::{
    EnrolError, Enrolled,
    config::{Config, HostPort, IdentityConfig},
};
use serde_json::json;

use crate::{Failure, log, output, setup::environment, target::usage};

/// Longest token file that is read.
const TOKEN_FILE_BYTES_MAX: u64 = 64 << 10;

/// Options of `isobar join`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Gossip port of a node that holds the authority, as HOST:PORT; default: what the token names
    seed: Option<HostPort>,
    /// The token, as `isobar ca token` printed it. Other users of this machine can see it while this command runs
    #[arg(
        long,
        value_name = "TOKEN",
        required_unless_present = "token_file",
        conflicts_with = "token_file"
    )]
    token: Option<String>,
    /// File with the token; `-` is standard input
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Name of this node, for a token that is good for several; default: the host name
    #[arg(long)]
    name: Option<NodeName>,
    /// Configuration file; written when it does not exist, otherwise left as it is
    #[arg(short, long, value_name = "FILE", default_value = "isobar.toml")]
    config: PathBuf,
    /// Directory of what the node keeps, for a configuration that is written
    #[arg(long, value_name = "DIR", default_value = ".isobar")]
    state_dir: PathBuf,
    /// Join although this machine has a certificate that is good
    #[arg(long)]
    replace: bool,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
}

/// What is to be done, once everything that can be wrong on this machine has been looked at: a token is good once.
struct Plan {
    token: Token,
    name: NodeName,
    seeds: Vec<Authority>,
    /// Where the identity goes.
    dir: PathBuf,
    state_dir: PathBuf,
    /// Whether the configuration is to be written.
    writes_config: bool,
}

pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    log::to_stderr(tracing::Level::WARN, options.json)?;
    let plan = plan(options)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (enrolled, seed) = runtime.block_on(enrol(&plan))?;
    runtime.shutdown_background();
    enrolled
        .identity
        .store(&plan.dir)
        .context("the token is used up, and the certificate cannot be stored")?;
    if let Some(revocations) = &enrolled.revocations {
        node::keep_revocations(&plan.dir, revocations)?;
    }
    if plan.writes_config {
        write_config(&options.config, &plan, &seed)?;
    }
    report(options, &plan, &enrolled.identity)?;
    Ok(())
}

fn plan(options: &Options) -> Result<Plan, Failure> {
    let token: Token = read_token(options)?.parse().map_err(Failure::usage)?;
    let name = name(options, &token)?;
    let now = clock::wall();
    if token.expires_at() <= now {
        let since = humantime::format_duration(whole_seconds(now, token.expires_at()));
        return Err(usage(format!(
            "the token ended {since} ago by this machine's clock: make a new one with `isobar ca token`, or set the clock"
        )));
    }
    let (state_dir, writes_config) = match options.config.try_exists() {
        Ok(true) => (configured(options, &token, &name)?, false),
        Ok(false) => (absolute(&options.state_dir)?, true),
        Err(error) => {
            return Err(usage(format!("cannot look at {}: {error}", options.config.display())));
        }
    };
    let dir = IdentityConfig::dir(&state_dir);
    if !options.replace {
        refuse_needless(&dir, now)?;
    }
    let seeds = seeds(options, &token)?;
    can_be_written(&dir)?;
    if writes_config {
        let beside = absolute(&options.config)?;
        can_be_written(beside.parent().unwrap_or_else(|| Path::new("/")))?;
    }
    Ok(Plan { token, name, seeds, dir, state_dir, writes_config })
}

fn read_token(options: &Options) -> Result<String, Failure> {
    if let Some(token) = &options.token {
        return Ok(token.trim().to_owned());
    }
    let path = options.token_file.as_deref().unwrap_or_else(|| Path::new("-"));
    let read = if path == Path::new("-") {
        std::io::read_to_string(std::io::stdin().lock())
    } else {
        match fs::metadata(path) {
            Ok(found) if found.len() > TOKEN_FILE_BYTES_MAX => {
                return Err(usage(format!("{} is too long for a token", path.display())));
            }
            _ => fs::read_to_string(path),
        }
    };
    let text = read.map_err(|error| {
        usage(format!("cannot read the token from {}: {error}", path.display()))
    })?;
    Ok(text.trim().to_owned())
}

/// The name this node will have: the token decides, or leaves it open.
fn name(options: &Options, token: &Token) -> Result<NodeName, Failure> {
    let names = token.names();
    let name = match (&options.name, names.only_name()) {
        (Some(name), _) => name.clone(),
        (None, Some(name)) => name,
        (None, None) => host_name().map_err(|why| {
            usage(format!(
                "the token is good for any node called {names}, and {why}: say which with --name"
            ))
        })?,
    };
    if !names.matches(&name) {
        return Err(usage(format!("the token is good for a node called {names}, not for {name}")));
    }
    Ok(name)
}

fn host_name() -> Result<NodeName, String> {
    let host = rustix::system::uname().nodename().to_string_lossy().to_lowercase();
    let label = host.split('.').next().unwrap_or_default().replace('_', "-");
    label
        .parse()
        .map_err(|error: base::NameError| format!("this host's name will not do ({error})"))
}

/// A configuration that is there must be for the node that joins; returns its state directory.
fn configured(options: &Options, token: &Token, name: &NodeName) -> Result<PathBuf, Failure> {
    let config = Config::load(&options.config, &environment()).map_err(Failure::usage)?;
    let said = (&config.node.name, &config.node.region, &config.mesh.trust_domain);
    let wanted = (name, token.region(), token.trust_domain());
    if said != wanted {
        return Err(usage(format!(
            "{} is for node {} in region {} of {}, and the token for node {} in region {} of {}: \
             give another file with --config, or get another token",
            options.config.display(),
            said.0,
            said.1,
            said.2,
            wanted.0,
            wanted.1,
            wanted.2,
        )));
    }
    Ok(config.node.state_dir)
}

/// A token is not spent where its certificate cannot be kept.
fn can_be_written(dir: &Path) -> Result<(), Failure> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    let tried = made.and_then(|()| tempfile::tempfile_in(dir));
    tried.map(drop).map_err(|error| {
        usage(format!("cannot write to {}: {error}: nothing was done", dir.display()))
    })
}

/// A token is not spent on a node that needs none.
fn refuse_needless(dir: &Path, now: SystemTime) -> Result<(), Failure> {
    let Ok(identity) = IdentityFiles::in_dir(dir).load() else { return Ok(()) };
    let left = humantime::format_duration(whole_seconds(identity.certificate().until, now));
    Err(usage(format!(
        "{} holds a good certificate of {} for another {left}, which the node renews by itself: nothing was done. \
         Add --replace to join again all the same, as after a revocation",
        dir.display(),
        identity.id(),
    )))
}

fn seeds(options: &Options, token: &Token) -> Result<Vec<Authority>, Failure> {
    if let Some(seed) = &options.seed {
        return Ok(vec![seed.authority()]);
    }
    let seeds = token.seeds().iter().filter_map(|seed| seed.parse::<HostPort>().ok());
    let seeds: Vec<_> = seeds.map(|seed| seed.authority()).collect();
    if seeds.is_empty() {
        return Err(usage(
            "the token does not say where to join: give the gossip port of the node it was made at, such as 10.0.0.1:8445",
        ));
    }
    Ok(seeds)
}

/// Asks one authority after the other; one that refuses has the last word.
async fn enrol(plan: &Plan) -> Result<(Enrolled, Authority), Failure> {
    let mut last = EnrolError::NobodyToAsk;
    for seed in &plan.seeds {
        match node::join(&plan.token, &plan.name, seed, &plan.dir).await {
            Ok(enrolled) => return Ok((enrolled, seed.clone())),
            Err(error @ EnrolError::Unreachable(_)) => last = error,
            Err(error) => return Err(error.into()),
        }
    }
    Err(last.into())
}

/// Writes what the node needs to start, and never over something.
fn write_config(path: &Path, plan: &Plan, seed: &Authority) -> Result<(), Failure> {
    let text = config_text(plan, seed);
    let written = fs::File::create_new(path).and_then(|mut file| file.write_all(text.as_bytes()));
    match written {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        written => written
            .with_context(|| {
                format!("the certificate is stored, and {} cannot be written", path.display())
            })
            .map_err(Failure::from),
    }
}

fn config_text(plan: &Plan, seed: &Authority) -> String {
    let (name, region, mesh) = (&plan.name, plan.token.region(), plan.token.trust_domain());
    format!(
        "# Node {name} in region {region} of {mesh}, as `isobar join` wrote it. Every key: `isobar schema`.\n\n\
         [node]\nname = \"{name}\"\nregion = \"{region}\"\nstate_dir = {}\n\n\
         [mesh]\ntrust_domain = \"{mesh}\"\n# Where this node finds the others, and who renews its certificate.\n\
         seeds = [\"{seed}\"]\n\
         \n# A GPU server behind this node:\n# [[engine]]\n# name = \"gpu-0\"\n# url = \"http://127.0.0.1:8001\"\n\
         \n# Who may call; nobody, until it says so here:\n# [[tenant]]\n# name = \"search\"\n\
         # api_key_sha256 = \"what `printf %s KEY | sha256sum` says\"\n# [[allow]]\n# tenant = \"search\"\n",
        toml_text(&plan.state_dir.display().to_string()),
    )
}

/// A text as TOML spells it: as JSON does.
fn toml_text(text: &str) -> String {
    json!(text).to_string()
}

fn report(options: &Options, plan: &Plan, identity: &NodeIdentity) -> Result<(), Failure> {
    let until = humantime::format_rfc3339_seconds(identity.certificate().until).to_string();
    let (id, config) = (identity.id().to_string(), options.config.display());
    if options.json {
        let result = json!({
            "id": id, "serial": identity.certificate().serial, "until": until,
            "identity": plan.dir, "config": options.config, "config_written": plan.writes_config,
        });
        return Ok(output::json_line(&result)?);
    }
    let kept = if plan.writes_config { "written" } else { "kept as it was" };
    output::text(&format!(
        "joined as {id}\n  certificate  until {until}, in {}\n  config       {config}, {kept}\n  start it:    isobar node -c {config}\n\
         Once it runs, the others find it by themselves.",
        plan.dir.display(),
    ))?;
    Ok(())
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| usage(format!("{}: {error}", path.display())))
}

fn whole_seconds(later: SystemTime, earlier: SystemTime) -> std::time::Duration {
    std::time::Duration::from_secs(later.duration_since(earlier).unwrap_or_default().as_secs())
}
