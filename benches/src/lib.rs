//! What every bench needs: processor time of this and of other processes, and medians.
//!
//! Machines drift, so a figure is a ratio of runs interleaved in one go, and processor time stands beside wall time.

use std::time::Duration;

use anyhow::Context as _;

/// Processor time, user and system, of process `pid` so far.
///
/// # Errors
/// When the process is gone.
pub fn cpu_of(pid: u32) -> anyhow::Result<Duration> {
    // Fields 14 and 15 of proc(5) `stat`, in clock ticks; the name in field 2 may hold spaces, so count after it.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("no process name")?;
    let ticks: u64 = fields
        .split_ascii_whitespace()
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().context("not a number of ticks"))
        .sum::<anyhow::Result<u64>>()?;
    let per_second = rustix::param::clock_ticks_per_second();
    Ok(Duration::from_millis(ticks * 1000 / per_second))
}

/// The middle one of some figures; 0 without any.
#[must_use]
pub fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_of_this_process_grows() {
        let before = cpu_of(std::process::id()).unwrap();
        let mut sum = 0u64;
        while cpu_of(std::process::id()).unwrap() < before + Duration::from_millis(30) {
            sum = (0..1_000_000u64).fold(sum, |sum, i| sum.wrapping_mul(31).wrapping_add(i));
        }
        assert!(sum != 1);
    }

    #[test]
    fn the_median_is_the_middle_one() {
        assert!((median(vec![9.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
    }
}
