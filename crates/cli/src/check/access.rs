//! Who may call: whether anybody may, and whether what callers are known by can be read.

use super::{
    facts::Facts,
    finding::{Check, Finding},
};

pub(super) fn check(facts: &Facts) -> Vec<Finding> {
    let mut config = facts.config.clone();
    if facts.is_dev() {
        // As `isobar node --dev-ca` does.
        config.open_for_development();
    }
    let unusable = node::check_access(&config).err().map(|error| {
        let remedy = "restore the file, or correct what names it: the node does not start";
        Finding::error(Check::AccessUnusable, "access", error.to_string(), remedy)
    });
    let who = config.who_may_call();
    let callers = if config.is_closed() {
        let remedy = "say who may call what, with [[tenant]] and [[allow]]; for development start the node with --dev";
        Finding::warning(Check::AccessNobody, "access", "nobody may call", remedy)
    } else {
        Finding::ok(Check::AccessNobody, "access", who)
    };
    unusable.into_iter().chain([callers]).collect()
}
