//! The rule clippy cannot say: dependencies point down, and the lower floors stay pure.
#![expect(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use serde_json::Value;

/// What a pure crate (floor 0 or 1) may not touch.
const IO_CRATES: [&str; 7] =
    ["tokio", "quinn", "rustls", "hickory-server", "hickory-resolver", "hyper", "socket2"];
const FLOOR_PURE_MAX: u64 = 1;

#[test]
fn dependencies_point_down() {
    let packages = packages();
    let floors: BTreeMap<&str, u64> =
        packages.iter().filter_map(|p| Some((name(p), floor(p)?))).collect();

    for package in packages.iter().filter(|p| floor(p).is_some()) {
        let (from, from_floor) = (name(package), floors[name(package)]);
        for dependency in package["dependencies"].as_array().unwrap() {
            if dependency["kind"] == "dev" {
                continue;
            }
            let to = dependency["name"].as_str().unwrap();
            if let Some(&to_floor) = floors.get(to) {
                assert!(
                    to_floor < from_floor,
                    "{from} (floor {from_floor}) -> {to} (floor {to_floor})"
                );
            }
            assert!(
                from_floor > FLOOR_PURE_MAX || !IO_CRATES.contains(&to),
                "{from} is pure (floor {from_floor}) and may not depend on {to}"
            );
        }
    }
}

#[test]
fn every_crate_has_a_floor() {
    for package in packages() {
        let in_crates = package["manifest_path"].as_str().unwrap().contains("/crates/");
        assert_eq!(in_crates, floor(&package).is_some(), "{}", name(&package));
    }
}

#[test]
fn every_package_takes_the_lints_of_the_workspace() {
    for package in packages() {
        let manifest = fs::read_to_string(package["manifest_path"].as_str().unwrap()).unwrap();
        assert!(manifest.contains("[lints]\nworkspace = true"), "{}", name(&package));
    }
}

#[test]
fn every_dependency_of_the_workspace_has_a_user() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let (_, table) = manifest.split_once("[workspace.dependencies]\n").unwrap();
    let (table, _) = table.split_once("\n[").unwrap();
    let used: Vec<String> = packages()
        .iter()
        .flat_map(|package| package["dependencies"].as_array().unwrap().clone())
        .map(|dependency| dependency["name"].as_str().unwrap().to_owned())
        .collect();
    for line in table.lines().filter(|line| line.contains(" = ")) {
        let dependency = line.split(" = ").next().unwrap();
        assert!(used.iter().any(|used| used == dependency), "nobody uses {dependency}");
    }
}

#[test]
fn no_private_key_is_committed() {
    // In two parts, or this file would be the first it finds.
    let needle = ["PRIVATE", " KEY-----"].concat();
    let files = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output().unwrap();
    let files = String::from_utf8(files.stdout).unwrap();
    for file in files.split('\0').filter(|file| !file.is_empty()) {
        // A file that was removed but is still in the index holds nothing.
        let bytes = fs::read(root().join(file)).unwrap_or_default();
        assert!(!bytes.windows(needle.len()).any(|w| w == needle.as_bytes()), "{file}");
    }
}

fn packages() -> Vec<Value> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

fn name(package: &Value) -> &str {
    package["name"].as_str().unwrap()
}

fn floor(package: &Value) -> Option<u64> {
    package["metadata"]["isobar"]["floor"].as_u64()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}
