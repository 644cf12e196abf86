//! Every test there is: Rust's, then other people's clients and servers against the real binary.

use std::process::Command;

use anyhow::Context as _;

use crate::{
    python::Python,
    run::{cargo, step, target},
};

pub(crate) fn test() -> anyhow::Result<()> {
    // What `isobar bench` is held against.
    let h2load = Command::new("h2load").arg("--version").output();
    h2load.context("h2load is missing: apt-get install nghttp2-client")?;
    // Machines of a test are network namespaces.
    let ip = Command::new("ip").arg("-V").output();
    ip.context("ip is missing: apt-get install iproute2")?;
    // What passes between them is lost by rules.
    let nft = Command::new("nft").arg("--version").output();
    nft.context("nft is missing: apt-get install nftables")?;
    let python = Python::set_up()?;
    step("Rust tests", cargo().args(["test", "--workspace"]))?;
    step("the binary", cargo().args(["build", "--package", "cli"]))?;
    // The demo puts load on eighteen processes: without optimisation it would measure the machine.
    step("the binary, optimised", cargo().args(["build", "--release", "--package", "cli"]))?;
    let binary = target().join("debug/isobar");
    step(
        "interoperability tests",
        python
            .command()
            .args(["-m", "pytest", "tests/python"])
            .env("ISOBAR_BIN", binary)
            .env("ISOBAR_DEMO_BIN", target().join("release/isobar")),
    )
}
