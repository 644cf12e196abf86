//! What a demo shows: a table of the regions while it runs, both arms when it is over. Lines of text with a style, for
//! terminals and for pictures alike.

use std::{
    io::{self, Write as _},
    time::{Duration, Instant},
};

use super::{
    Arm, Killed,
    traffic::Figures,
    world::{ENGINES_PER_NODE, NODES_PER_REGION, REGIONS, SLOTS},
};

/// How a line looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    Plain,
    Head,
    Dim,
    Good,
    Bad,
}

/// A line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line(pub(crate) Style, pub(crate) String);

fn line(style: Style, text: impl Into<String>) -> Line {
    Line(style, text.into())
}

/// What runs, in a sentence.
pub(crate) fn title() -> Line {
    let nodes = REGIONS.len() * NODES_PER_REGION;
    let engines = nodes * ENGINES_PER_NODE;
    line(
        Style::Head,
        format!(
            "isobar demo: {} regions, {nodes} nodes, {engines} simulated GPU servers of {SLOTS} slots",
            REGIONS.len()
        ),
    )
}

/// The table of an arm that runs.
pub(crate) fn table(arm: &mut Arm, now: Instant, of: Duration) -> Vec<Line> {
    let passed = now.saturating_duration_since(arm.start).min(of);
    let mut lines = vec![
        title(),
        line(Style::Plain, ""),
        line(
            Style::Head,
            format!("{}   {:>2} s of {} s", arm.what, passed.as_secs(), of.as_secs()),
        ),
        line(
            Style::Dim,
            "region  demand  calls/s  in flight  first token p50/p99    busy  forwarded",
        ),
    ];
    let mut all = Figures::default();
    for ((name, demand), figures) in REGIONS.iter().zip(&mut arm.regions) {
        let rate = figures.per_second(now);
        lines.push(row(name, Some(*demand), rate, figures));
        all.add(figures);
    }
    let rate = arm.regions.iter_mut().map(|figures| figures.per_second(now)).sum();
    lines.push(row("all", None, rate, &all));
    for event in &arm.events {
        lines.push(line(Style::Bad, event));
    }
    lines
}

fn row(name: &str, demand: Option<f64>, rate: f64, figures: &Figures) -> Line {
    let demand = demand.map_or_else(String::new, |demand| format!("{:.0} %", demand * 100.0));
    let style = match figures.busy_share() {
        share if share >= 0.02 => Style::Bad,
        _ => Style::Good,
    };
    line(
        style,
        format!(
            "{name:<6}  {demand:>6}  {rate:>7.1}  {:>9}  {:>19}  {:>6}  {:>9}",
            figures.in_flight,
            format!("{} / {}", ms(figures, 0.5), ms(figures, 0.99)),
            percent(figures.busy_share()),
            figures.forwarded,
        ),
    )
}

fn ms(figures: &Figures, quantile: f64) -> String {
    let seconds = figures.first_token.quantile_s(quantile);
    seconds.map_or_else(|| "-".to_owned(), |seconds| format!("{:.0} ms", seconds * 1e3))
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// Both arms side by side.
pub(crate) fn summary(direct: &Figures, mesh: &Figures, killed: &Killed) -> Vec<Line> {
    let count = |count: u64, figures: &Figures| {
        format!("{count} ({})", percent(count as f64 / figures.calls.max(1) as f64))
    };
    let both = |what: &str, of: &dyn Fn(&Figures) -> String| {
        line(Style::Plain, format!("{what:<24} {:>20}   {:>20}", of(direct), of(mesh)))
    };
    let styled = |style, Line(_, text): Line| Line(style, text);
    vec![
        title(),
        line(Style::Plain, ""),
        line(
            Style::Head,
            format!(
                "{:<24} {:>20}   {:>20}",
                "the same calls", "straight to engines", "through the mesh"
            ),
        ),
        both("calls", &|f| f.calls.to_string()),
        styled(Style::Good, both("answered", &|f| count(f.ok, f))),
        styled(Style::Bad, both("refused: server busy", &|f| count(f.busy, f))),
        both("failed", &|f| f.failed.to_string()),
        both("streams cut", &|f| f.cut.to_string()),
        both("served by another node", &|f| {
            if f.forwarded > 0 { count(f.forwarded, f) } else { "-".into() }
        }),
        both("first token p50 / p99", &|f| format!("{} / {}", ms(f, 0.5), ms(f, 0.99))),
        line(Style::Plain, ""),
        line(
            Style::Dim,
            format!("Killed on the way: engine {} and node {}.", killed.engine, killed.node),
        ),
        line(Style::Dim, format!("Calls that failed for it: {}.", killed.failed_calls)),
    ]
}

/// A terminal that is drawn over again and again, or a log.
/// Lines are below eighty columns: a wrapped one could not be drawn over.
#[derive(Debug)]
pub(crate) struct Screen {
    is_terminal: bool,
    drawn: usize,
}

impl Screen {
    /// Standard error: what is shown on the way is no result.
    pub(crate) fn new() -> Self {
        Self { is_terminal: io::IsTerminal::is_terminal(&io::stderr()), drawn: 0 }
    }

    /// Whether somebody watches.
    pub(crate) fn is_terminal(&self) -> bool {
        self.is_terminal
    }

    /// Draws over what was drawn before. Nothing where nobody watches.
    pub(crate) fn draw(&mut self, lines: &[Line]) {
        if !self.is_terminal {
            return;
        }
        let mut text = String::new();
        if self.drawn > 0 {
            text.push_str(&format!("\x1b[{}A", self.drawn));
        }
        for Line(style, line) in lines {
            let colour = match style {
                Style::Plain => "0",
                Style::Head => "1",
                Style::Dim => "2",
                Style::Good => "32",
                Style::Bad => "31",
            };
            text.push_str(&format!("\x1b[2K\x1b[{colour}m{line}\x1b[0m\n"));
        }
        text.push_str("\x1b[J");
        self.drawn = lines.len();
        // Without standard error there is nobody left to see it.
        drop(io::stderr().lock().write_all(text.as_bytes()));
    }

    /// What is drawn now stays.
    pub(crate) fn keep(&mut self) {
        self.drawn = 0;
    }

    /// A line for a log, where nobody watches.
    pub(crate) fn log(&self, text: &str) {
        if !self.is_terminal {
            crate::output::note(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_line_wraps_on_a_terminal_of_eighty_columns() {
        let mut figures = Figures::default();
        (figures.in_flight, figures.calls, figures.ok) = (1_000, 99_999, 88_888);
        (figures.busy, figures.forwarded) = (11_111, 12_345);
        figures.first_token.record(Duration::from_millis(12_345));
        let now = base::clock::now();
        let events = vec!["engine eu-1/gpu-eu-1 was killed".to_owned()];
        let regions = vec![figures.clone(); REGIONS.len()];
        let mut arm = Arm { what: "straight to the engines", start: now, regions, events };
        let killed =
            Killed { engine: "eu-1/gpu-eu-1".into(), node: "eu-1".into(), failed_calls: 99 };
        let lines =
            [table(&mut arm, now, Duration::from_secs(20)), summary(&figures, &figures, &killed)];
        for Line(_, text) in lines.iter().flatten() {
            assert!(text.chars().count() < 80, "{text}");
        }
    }
}
