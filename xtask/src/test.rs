//! Every test there is: Rust's, then other people's clients and servers against the real binary.

use crate::{
    python::Python,
    run::{cargo, step, target},
};

pub(crate) fn test() -> anyhow::Result<()> {
    let python = Python::set_up()?;
    step("Rust tests", cargo().args(["test", "--workspace"]))?;
    step("the binary", cargo().args(["build", "--package", "cli"]))?;
    let binary = target().join("debug/isobar");
    step(
        "interoperability tests",
        python.command().args(["-m", "pytest", "tests/python"]).env("ISOBAR_BIN", binary),
    )
}
