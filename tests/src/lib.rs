//! Tests of the whole: rules of the workspace (`tests/tidy.rs`) and interoperability with other people's clients and servers
//! (`python/`, run by `cargo xtask test`).
