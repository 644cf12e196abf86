//! The project's own commands: `cargo xtask test`, `cargo xtask lint`, `cargo xtask ci`.
//!
//! Each does all the set-up it needs and never asks.

mod lint;
mod python;
mod run;
mod test;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask COMMAND

  test   set up what the tests need, then run all of them
  lint   formatting, clippy, documentation, dependency bans and licences
  ci     lint, then test
";

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let outcome = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["test"] => test::test(),
        ["lint"] => lint::lint(),
        ["ci"] => lint::lint().and_then(|()| test::test()),
        _ => {
            run::say(USAGE);
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            run::say(&format!("error: {error:#}\n"));
            ExitCode::FAILURE
        }
    }
}
