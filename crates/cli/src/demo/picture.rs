//! A recording as a picture: the frames a terminal showed, one after another, as an SVG that plays itself.

use super::screen::{Line, Style};

const CHARACTER_WIDTH: f64 = 8.4;
const LINE_HEIGHT: usize = 20;
const MARGIN: usize = 16;
/// How long a frame is shown, and the last one.
const FRAME_S: f64 = 0.5;
const LAST_S: f64 = 12.0;

/// The frames as an SVG. Where animation is off, or not understood, the last one is seen.
pub(crate) fn svg(frames: &[Vec<Line>]) -> String {
    let columns = frames.iter().flatten().map(|Line(_, text)| text.chars().count()).max();
    let rows = frames.iter().map(Vec::len).max().unwrap_or(0);
    let width = (columns.unwrap_or(0) as f64).mul_add(CHARACTER_WIDTH, 2.0 * MARGIN as f64).ceil();
    let height = rows * LINE_HEIGHT + 2 * MARGIN;
    let shown = frames.len().saturating_sub(1) as f64;
    let all = shown.mul_add(FRAME_S, LAST_S);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         xml:space=\"preserve\" role=\"img\" aria-label=\"isobar demo\">\n<style>\n\
         text {{ font: 14px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; white-space: pre; fill: #d0d7de; }}\n\
         .head {{ font-weight: bold; fill: #ffffff; }} .dim {{ fill: #8b949e; }} .good {{ fill: #56d364; }} .bad {{ fill: #ff7b72; }}\n\
         .f {{ visibility: hidden; animation-duration: {all}s; animation-iteration-count: infinite; animation-timing-function: step-end; }}\n\
         .last {{ visibility: visible; }}\n"
    );
    let count = frames.len();
    for index in 0..count {
        let from = index as f64 * FRAME_S / all * 100.0;
        let to =
            if index + 1 == count { 100.0 } else { (index + 1) as f64 * FRAME_S / all * 100.0 };
        let before = if index > 0 { "0% { visibility: hidden } " } else { "" };
        let after = if index + 1 == count { "visible" } else { "hidden" };
        svg.push_str(&format!(
            "@keyframes f{index} {{ {before}{from:.2}% {{ visibility: visible }} {to:.2}% {{ visibility: {after} }} }}\n"
        ));
    }
    svg.push_str(&format!(
        "</style>\n<rect width=\"{width}\" height=\"{height}\" rx=\"8\" fill=\"#0d1117\"/>\n"
    ));
    for (index, frame) in frames.iter().enumerate() {
        let last = if index + 1 == count { " last" } else { "" };
        svg.push_str(&format!("<g class=\"f{last}\" style=\"animation-name: f{index}\">\n"));
        for (row, Line(style, text)) in frame.iter().enumerate().filter(|(_, l)| !l.1.is_empty()) {
            let y = MARGIN + (row + 1) * LINE_HEIGHT - 5;
            let class = match style {
                Style::Plain => "",
                Style::Head => " class=\"head\"",
                Style::Dim => " class=\"dim\"",
                Style::Good => " class=\"good\"",
                Style::Bad => " class=\"bad\"",
            };
            svg.push_str(&format!(
                "<text x=\"{MARGIN}\" y=\"{y}\"{class}>{}</text>\n",
                escaped(text)
            ));
        }
        svg.push_str("</g>\n");
    }
    svg.push_str("</svg>\n");
    svg
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_is_in_the_picture_and_the_last_is_seen_without_animation() {
        let frame = |text: &str| vec![Line(Style::Good, text.to_owned())];
        let svg = svg(&[frame("1 < 2"), frame("a & b")]);
        assert!(svg.contains("1 &lt; 2") && svg.contains("a &amp; b"));
        assert_eq!(svg.matches("class=\"f\"").count(), 1);
        assert_eq!(svg.matches("class=\"f last\"").count(), 1);
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    }
}
