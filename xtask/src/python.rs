//! The Python the interoperability tests run in: a virtual environment with pinned packages, made again when the pins change.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;

use crate::run::{root, step, target};

/// A ready environment.
pub(crate) struct Python {
    interpreter: PathBuf,
    stubs: PathBuf,
}

impl Python {
    /// Makes what is missing.
    pub(crate) fn set_up() -> anyhow::Result<Self> {
        let home = target().join("python");
        let (environment, stubs) = (home.join("venv"), home.join("stubs"));
        let interpreter = environment.join("bin/python");
        let pins = root().join("tests/python/requirements.txt");
        let wanted = fs::read_to_string(&pins).with_context(|| format!("{}", pins.display()))?;
        // Written last: an environment without it was not finished.
        let stamp = environment.join("requirements.txt");
        if fs::read_to_string(&stamp).ok().as_deref() != Some(wanted.as_str()) {
            check_version()?;
            if environment.exists() {
                fs::remove_dir_all(&environment)?;
            }
            step(
                "Python environment",
                Command::new("python3").args(["-m", "venv"]).arg(&environment),
            )
            .context("python3 cannot make an environment: apt-get install python3-venv")?;
            let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"];
            step("Python packages", Command::new(&interpreter).args(install).arg(&pins))?;
            fs::write(&stamp, wanted)?;
        }
        fs::create_dir_all(&stubs)?;
        generate_stubs(&interpreter, &stubs)?;
        Ok(Self { interpreter, stubs })
    }

    /// A command that runs Python with the stubs at hand.
    pub(crate) fn command(&self) -> Command {
        let mut python = Command::new(&self.interpreter);
        python
            .current_dir(root())
            .env("ISOBAR_STUBS", &self.stubs)
            .env("PYTHONDONTWRITEBYTECODE", "1");
        python
    }
}

fn check_version() -> anyhow::Result<()> {
    let check = "import sys; sys.exit(sys.version_info < (3, 11))";
    let status = Command::new("python3")
        .args(["-c", check])
        .status()
        .context("python3 is missing: apt-get install python3 python3-venv")?;
    anyhow::ensure!(status.success(), "python3 is older than 3.11: install a newer one");
    Ok(())
}

/// Client and server code of the test service and of load reports, from the same proto files the Rust side uses.
fn generate_stubs(interpreter: &Path, stubs: &Path) -> anyhow::Result<()> {
    let out = |option: &str| format!("--{option}={}", stubs.display());
    step(
        "Python stubs",
        Command::new(interpreter)
            .current_dir(root())
            .args(["-m", "grpc_tools.protoc", "-I", "proto"])
            .args([out("python_out"), out("grpc_python_out")])
            .args(["isobar/test/v1/kinds.proto", "xds/data/orca/v3/orca_load_report.proto"])
            .arg("xds/service/orca/v3/orca.proto"),
    )
}
