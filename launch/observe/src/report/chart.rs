//! Charts as inline SVG: lines with their spread, and stacked areas. Pure.
//!
//! Colours and fonts come from the page's style sheet (classes `s0` to `s6`), so that a chart follows light and dark.
//! Every chart carries its numbers in `data-chart` for the page's script, which shows values under the pointer.

use super::page::escape;
use super::series::{Bucket, Series, ticks};
use serde_json::json;
use std::fmt::Write;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 250.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 40.0;
const BUCKETS: usize = 280;

/// How the numbers of an axis are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As they are.
    Plain,
    /// `12k`, `3.4M`.
    Count,
    /// A fraction as per cent.
    Percent,
    /// Bytes as MiB or GiB.
    Bytes,
    /// Seconds, or milliseconds.
    Seconds,
}

impl Format {
    /// Ticks are round in multiples of this.
    fn unit(self, highest: f64) -> f64 {
        match self {
            Format::Bytes if highest >= (1u64 << 30) as f64 => (1u64 << 30) as f64,
            Format::Bytes => (1u64 << 20) as f64,
            _ => 1.0,
        }
    }

    /// A number for people.
    pub fn write(self, value: f64) -> String {
        let magnitude = value.abs();
        match self {
            _ if value == 0.0 => "0".into(),
            Format::Count if magnitude >= 1e9 => format!("{}G", short(value / 1e9, 3)),
            Format::Count if magnitude >= 1e6 => format!("{}M", short(value / 1e6, 3)),
            Format::Count if magnitude >= 1e3 => format!("{}k", short(value / 1e3, 3)),
            Format::Percent => format!("{}%", short(100.0 * value, 3)),
            Format::Bytes if magnitude >= (1u64 << 30) as f64 => {
                format!("{} GiB", short(value / (1u64 << 30) as f64, 3))
            }
            Format::Bytes => format!("{} MiB", short(value / (1u64 << 20) as f64, 3)),
            Format::Seconds if magnitude < 1.0 => format!("{} ms", short(1e3 * value, 3)),
            Format::Seconds => format!("{} s", short(value, 3)),
            _ => short(value, 4),
        }
    }
}

/// So many significant digits at most, no trailing zeros; an exponent for the very small and large.
fn short(value: f64, significant: i32) -> String {
    let magnitude = value.abs();
    if magnitude > 0.0 && !(1e-3..1e6).contains(&magnitude) {
        let text = format!("{value:.2e}");
        return text.replace(".00e", "e").replace("0e", "e");
    }
    let digits = (significant - 1 - magnitude.max(1e-3).log10().floor() as i32).clamp(0, 6) as usize;
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// One line of a chart.
#[derive(Clone, Debug)]
pub struct Line {
    /// Its name in the legend.
    pub name: String,
    /// Which of the style sheet's colours.
    pub color: usize,
    /// Its points.
    pub series: Series,
    /// Draw each point too: for lines with few.
    pub dots: bool,
}

/// What all charts of a page share.
#[derive(Clone, Debug)]
pub struct Frame {
    /// First and last step on the x axis.
    pub steps: (u64, u64),
    /// Steps at which the run went on after a failure or from a checkpoint.
    pub restarts: Vec<u64>,
}

/// A chart of lines; empty where nothing was recorded. `from_zero` starts the y axis at 0.
pub fn lines(title: &str, format: Format, from_zero: bool, lines: &[Line], frame: &Frame) -> String {
    let drawn: Vec<(&Line, Vec<Bucket>)> = lines
        .iter()
        .filter(|line| line.series.finite().next().is_some())
        .map(|line| (line, line.series.buckets(frame.steps, BUCKETS)))
        .collect();
    if drawn.is_empty() {
        return empty(title, lines);
    }
    let (range, clipped) = y_range(&drawn, from_zero);
    let scale = Scale { steps: frame.steps, range };
    let mut body = axes(&scale, format, frame);
    for (line, buckets) in &drawn {
        body += &spread(&scale, line, buckets);
        body += &path(&scale, line, buckets);
        body += &broken(&scale, &line.series);
    }
    let rows: Vec<_> =
        drawn.iter().map(|(line, buckets)| (line.name.as_str(), line.color, buckets.as_slice())).collect();
    let note = if clipped { "highest peaks cut off" } else { "" };
    figure(title, note, &legend(&rows, format, drawn.len() > 1), &data(&rows, format), &body)
}

/// A chart of areas on top of each other, the first at the bottom; empty where nothing was recorded.
pub fn stacked(title: &str, format: Format, lines: &[Line], frame: &Frame) -> String {
    let drawn: Vec<(&Line, Vec<Bucket>)> = lines
        .iter()
        .filter(|line| line.series.finite().any(|v| v > 0.0))
        .map(|line| (line, line.series.buckets(frame.steps, BUCKETS)))
        .collect();
    let Some(length) = drawn.iter().map(|(_, buckets)| buckets.len()).min().filter(|n| *n > 0) else {
        return empty(title, lines);
    };
    let value = |bucket: &Bucket| if bucket.mean.is_finite() { bucket.mean } else { 0.0 };
    let total = |i: usize| drawn.iter().map(|(_, buckets)| value(&buckets[i])).sum::<f64>();
    let top = (0..length).map(total).fold(0.0, f64::max);
    let scale = Scale { steps: frame.steps, range: (0.0, top * 1.05) };
    let mut below = vec![0.0; length];
    let mut areas = String::new();
    for (line, buckets) in &drawn {
        let above: Vec<f64> = (0..length).map(|i| below[i] + value(&buckets[i])).collect();
        let up = (0..length).map(|i| scale.point(buckets[i].step, above[i]));
        let down = (0..length).rev().map(|i| scale.point(buckets[i].step, below[i]));
        let points: Vec<String> = up.chain(down).collect();
        let _ = write!(areas, r#"<polygon class="area s{}" points="{}"/>"#, line.color, points.join(" "));
        below = above;
    }
    let rows: Vec<_> =
        drawn.iter().map(|(line, buckets)| (line.name.as_str(), line.color, buckets.as_slice())).collect();
    let legend = mean_legend(&drawn, format);
    figure(title, "mean", &legend, &data(&rows, format), &(areas + &axes(&scale, format, frame)))
}

struct Scale {
    steps: (u64, u64),
    range: (f64, f64),
}

impl Scale {
    fn x(&self, step: f64) -> f64 {
        let (first, last) = (self.steps.0 as f64, self.steps.1 as f64);
        let part = if last > first { (step - first) / (last - first) } else { 0.5 };
        LEFT + part * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, value: f64) -> f64 {
        let part = ((value - self.range.0) / (self.range.1 - self.range.0)).clamp(0.0, 1.0);
        HEIGHT - BOTTOM - part * (HEIGHT - BOTTOM - TOP)
    }

    fn point(&self, step: f64, value: f64) -> String {
        format!("{:.1},{:.1}", self.x(step), self.y(value))
    }
}

/// The values to show, with a margin; single peaks far above the rest are cut off, which the second answer says.
fn y_range(drawn: &[(&Line, Vec<Bucket>)], from_zero: bool) -> ((f64, f64), bool) {
    let highs = drawn.iter().flat_map(|(_, buckets)| buckets).map(|b| b.high);
    let lows = drawn.iter().flat_map(|(_, buckets)| buckets).map(|b| b.low);
    let (low, high) = (lows.fold(f64::INFINITY, f64::min), highs.fold(f64::NEG_INFINITY, f64::max));
    let usual = drawn
        .iter()
        .filter(|(line, _)| line.series.points.len() >= 50)
        .filter_map(|(line, _)| line.series.quantile(0.98))
        .fold(f64::NEG_INFINITY, f64::max);
    let clipped = usual.is_finite() && usual > low && high - low > 4.0 * (usual - low);
    let high = if clipped { low + 1.5 * (usual - low) } else { high };
    let low = if from_zero { low.min(0.0) } else { low };
    let margin = match (high > low, high == 0.0) {
        (true, _) => 0.06 * (high - low),
        // Nothing but zeros: there is no scale to tell them by.
        (false, true) => 1.0,
        (false, false) => 0.1 * high.abs(),
    };
    let bottom = if from_zero && low >= 0.0 { 0.0 } else { low - margin };
    ((bottom, high + margin), clipped)
}

fn axes(scale: &Scale, format: Format, frame: &Frame) -> String {
    let mut out = String::new();
    let (left, right, bottom) = (LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM);
    let unit = format.unit(scale.range.1);
    for tick in ticks(scale.range.0 / unit, scale.range.1 / unit, 5) {
        let tick = tick * unit;
        let y = scale.y(tick);
        let _ = write!(out, r#"<line class="grid" x1="{left}" x2="{right}" y1="{y:.1}" y2="{y:.1}"/>"#);
        let label = format.write(tick);
        let _ = write!(
            out,
            r#"<text class="tick" x="{:.1}" y="{:.1}" text-anchor="end">{label}</text>"#,
            left - 7.0,
            y + 3.5
        );
    }
    let (first, last) = (scale.steps.0 as f64, scale.steps.1 as f64);
    let whole = |t: &f64| t.fract() == 0.0;
    let only = (first == last).then_some(first);
    for tick in ticks(first, last, 7).into_iter().chain(only).filter(whole) {
        let (x, label) = (scale.x(tick), Format::Count.write(tick));
        let _ = write!(out, r#"<line class="axis" x1="{x:.1}" x2="{x:.1}" y1="{bottom}" y2="{:.1}"/>"#, bottom + 4.0);
        let _ = write!(
            out,
            r#"<text class="tick" x="{x:.1}" y="{:.1}" text-anchor="middle">{label}</text>"#,
            bottom + 17.0
        );
    }
    let _ = write!(out, r#"<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>"#);
    let middle = (left + right) / 2.0;
    let _ = write!(out, r#"<text class="label" x="{middle}" y="{}" text-anchor="middle">step</text>"#, HEIGHT - 7.0);
    for &step in frame.restarts.iter().filter(|s| (frame.steps.0..=frame.steps.1).contains(*s)) {
        let x = scale.x(step as f64);
        let _ = write!(
            out,
            r#"<line class="restart" x1="{x:.1}" x2="{x:.1}" y1="{TOP}" y2="{bottom}"><title>went on from step {step}</title></line>"#
        );
    }
    out
}

/// From the smallest to the largest value of each bucket, where buckets hold several.
fn spread(scale: &Scale, line: &Line, buckets: &[Bucket]) -> String {
    let mut out = String::new();
    for run in finite_runs(buckets).filter(|run| run.iter().any(|b| b.high > b.low)) {
        let up = run.iter().map(|b| scale.point(b.step, b.high));
        let down = run.iter().rev().map(|b| scale.point(b.step, b.low));
        let points: Vec<String> = up.chain(down).collect();
        let _ = write!(out, r#"<polygon class="spread s{}" points="{}"/>"#, line.color, points.join(" "));
    }
    out
}

fn path(scale: &Scale, line: &Line, buckets: &[Bucket]) -> String {
    let mut out = String::new();
    for run in finite_runs(buckets) {
        let points: Vec<String> = run.iter().map(|b| scale.point(b.step, b.mean)).collect();
        let _ = write!(out, r#"<polyline class="line s{}" points="{}"/>"#, line.color, points.join(" "));
        if run.len() == 1 || (line.dots && buckets.len() <= 60) {
            for b in run {
                let (x, y) = (scale.x(b.step), scale.y(b.mean));
                let _ = write!(out, r#"<circle class="dot s{}" cx="{x:.1}" cy="{y:.1}" r="2.6"/>"#, line.color);
            }
        }
    }
    out
}

/// Marks at the top for steps whose value is not a number.
fn broken(scale: &Scale, series: &Series) -> String {
    let mut out = String::new();
    for step in series.broken_steps().take(200) {
        let x = scale.x(step as f64);
        let _ = write!(
            out,
            r#"<path class="broken" d="M{:.1} {TOP} h8 l-4 7 z"><title>step {step}: not finite</title></path>"#,
            x - 4.0
        );
    }
    out
}

fn finite_runs(buckets: &[Bucket]) -> impl Iterator<Item = &[Bucket]> {
    buckets.chunk_by(|a, b| a.mean.is_finite() == b.mean.is_finite()).filter(|run| run[0].mean.is_finite())
}

type Row<'a> = (&'a str, usize, &'a [Bucket]);

fn legend(rows: &[Row<'_>], format: Format, with_names: bool) -> String {
    let mut out = String::new();
    for (name, color, buckets) in rows {
        let Some(last) = buckets.iter().rev().find(|b| b.mean.is_finite()) else { continue };
        let name = escape(name);
        let name = if with_names { format!(r#"<i class="s{color}"></i>{name} "#) } else { String::new() };
        let _ = write!(out, "<span>{name}<b>{}</b></span>", format.write(last.mean));
    }
    out
}

/// Means over the run with their shares.
fn mean_legend(drawn: &[(&Line, Vec<Bucket>)], format: Format) -> String {
    let mean = |line: &Line| {
        let (sum, count) = line.series.finite().fold((0.0, 0.0), |(sum, count), v| (sum + v, count + 1.0));
        if count > 0.0 { sum / count } else { 0.0 }
    };
    let total: f64 = drawn.iter().map(|(line, _)| mean(line)).sum();
    let mut out = String::new();
    for (line, _) in drawn {
        let (value, share) = (mean(line), 100.0 * mean(line) / total.max(f64::MIN_POSITIVE));
        let (name, color, value) = (escape(&line.name), line.color, format.write(value));
        let _ = write!(out, r#"<span><i class="s{color}"></i>{name} <b>{value}</b> {share:.0}%</span>"#);
    }
    out
}

/// What the page's script needs to show values: positions in the drawing, and text.
fn data(rows: &[Row<'_>], format: Format) -> String {
    let series: Vec<_> = rows
        .iter()
        .map(|(name, color, buckets)| {
            let finite = buckets.iter().filter(|b| b.mean.is_finite());
            let points: Vec<_> = finite.map(|b| json!([b.step.round() as u64, format.write(b.mean)])).collect();
            json!({ "name": name, "color": color, "points": points })
        })
        .collect();
    escape(&json!(series).to_string())
}

fn figure(title: &str, note: &str, legend: &str, data: &str, body: &str) -> String {
    let title = escape(title);
    let note = if note.is_empty() { String::new() } else { format!(r#"<span class="note">{note}</span>"#) };
    format!(
        r#"<figure><figcaption><h3>{title}</h3><div class="legend">{note}{legend}</div></figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}" data-chart="{data}">{body}</svg></figure>"#
    )
}

fn empty(title: &str, lines: &[Line]) -> String {
    if lines.iter().all(|line| line.series.points.is_empty()) {
        return String::new();
    }
    let (x, y) = (WIDTH / 2.0, HEIGHT / 2.0);
    let body = format!(r#"<text class="label" x="{x}" y="{y}" text-anchor="middle">no finite value recorded</text>"#);
    figure(title, "", "", "[]", &body)
}

/// The attributes that the page's script needs to find the plotting area.
pub fn geometry() -> String {
    format!(
        r#"data-width="{WIDTH}" data-left="{LEFT}" data-right="{RIGHT}" data-top="{TOP}" data-bottom="{BOTTOM}" data-height="{HEIGHT}""#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let cases = [
            (Format::Plain, 2.5, "2.5"),
            (Format::Plain, 0.0, "0"),
            (Format::Plain, 3e-4, "3e-4"),
            (Format::Plain, 123.456, "123.5"),
            (Format::Count, 12_000.0, "12k"),
            (Format::Count, 3_456_000.0, "3.46M"),
            (Format::Count, 999.0, "999"),
            (Format::Percent, 0.314, "31.4%"),
            (Format::Bytes, 1_610_612_736.0, "1.5 GiB"),
            (Format::Bytes, 1_048_576.0, "1 MiB"),
            (Format::Seconds, 0.0123, "12.3 ms"),
            (Format::Seconds, 2.0, "2 s"),
        ];
        for (format, value, expected) in cases {
            assert_eq!(format.write(value), expected, "{format:?} {value}");
        }
    }

    #[test]
    fn one_peak_does_not_flatten_the_rest() {
        let mut points: Vec<(u64, f64)> = (1..=500).map(|i| (i, 1.0 + (i % 3) as f64 / 10.0)).collect();
        points[300].1 = 1e5;
        let line = Line { name: "x".into(), color: 0, series: Series { points }, dots: false };
        let buckets = line.series.buckets((1, 500), BUCKETS);
        let (range, clipped) = y_range(&[(&line, buckets)], false);
        assert!(clipped && range.1 < 2.0, "{range:?}");
        let svg = lines("t", Format::Plain, false, &[line], &Frame { steps: (1, 500), restarts: vec![] });
        assert!(svg.contains("cut off") && !svg.contains("NaN"));
    }

    #[test]
    fn odd_series_draw() {
        let frame = Frame { steps: (3, 3), restarts: vec![3] };
        let chart = |points: Vec<(u64, f64)>| {
            let line = Line { name: "x".into(), color: 1, series: Series { points }, dots: true };
            lines("a < b", Format::Plain, false, std::slice::from_ref(&line), &frame)
                + &stacked("s", Format::Seconds, &[line], &frame)
        };
        assert_eq!(chart(vec![]), "");
        assert!(chart(vec![(3, f64::NAN)]).contains("no finite value"));
        let one = chart(vec![(3, 0.0)]);
        assert!(one.contains("<circle") && one.contains("a &lt; b") && !one.contains("NaN"), "{one}");
        assert!(!chart(vec![(3, 7.0)]).contains("NaN"));
    }
}
