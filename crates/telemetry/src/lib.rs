//! What happened, in numbers. So far: latencies.
//!
//! Pure: a duration in, figures out. Names, labels and the text format are the node's.

mod latency;

pub use latency::{Latency, LatencySnapshot};
