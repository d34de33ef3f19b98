//! The page around the charts. Pure: text in, HTML out.

use super::chart::{self, Format, Frame, Line};
use super::rl;
use super::series::Series;
use super::{Run, Status};
use crate::Metric;
use crate::records::{EventKind, EventRecord, SampleRecord};
use std::fmt::Write;

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");

/// Text as HTML content or attribute.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            // Control characters have no place in HTML.
            c if c.is_control() && c != '\n' && c != '\t' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// The whole page.
pub fn render(run: &Run) -> String {
    let frame = frame(run);
    let name = escape(&run.name);
    let (first, last) = frame.steps;
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width,initial-scale=1\"><title>{name} · tangelo</title>\n<style>{STYLE}</style></head>\n\
         <body data-first=\"{first}\" data-last=\"{last}\" {}><main>\n",
        chart::geometry()
    );
    page += &header(run);
    page += &tiles(run);
    let charts = charts(run, &frame);
    let none = "<p class=\"none\">Nothing recorded yet: metrics.jsonl is empty or absent.</p>";
    let charts = if charts.is_empty() { none } else { charts.as_str() };
    let _ = write!(page, "<h2>Curves</h2>\n<div class=\"charts\">{charts}</div>\n");
    page += &samples(&run.samples);
    page += &events(&run.events);
    if let Some(config) = &run.config_text {
        let _ = write!(
            page,
            "<h2>Configuration</h2>\n<details><summary>config.toml, resolved</summary><pre>{}</pre></details>\n",
            escape(config)
        );
    }
    let _ =
        write!(page, "<footer>{}</footer>\n</main>\n<script>{SCRIPT}</script></body></html>\n", escape(&run.written));
    page
}

fn frame(run: &Run) -> Frame {
    let first = run.named.first().map_or(0, |r| r.step);
    let last = run.named.last().map_or(first, |r| r.step);
    let resumed = run.events.iter().filter(|e| matches!(e.kind, EventKind::Restart | EventKind::Resume));
    let mut restarts: Vec<u64> = resumed.filter_map(|e| e.step).filter(|step| *step > 0).collect();
    restarts.dedup();
    Frame { steps: (first, last), restarts }
}

fn header(run: &Run) -> String {
    let (class, text) = match &run.status {
        Status::Done => ("good", "done"),
        Status::Failed => ("bad", "failed"),
        Status::Stopped => ("", "stopped"),
        Status::Unfinished => ("", "not finished"),
        Status::Empty => ("", "nothing recorded"),
    };
    let about = [run.description.as_str(), run.model.as_str(), run.started.as_str()];
    let about: Vec<String> = about.into_iter().filter(|t| !t.is_empty()).map(escape).collect();
    let name = escape(&run.name);
    format!(
        "<header><h1>{name}<span class=\"status {class}\">{text}</span></h1><p>{}</p></header>\n",
        about.join(" · ")
    )
}

fn tiles(run: &Run) -> String {
    let series = |metric| Series::of(&run.records, metric);
    let last = |metric| series(metric).last();
    let mut tiles: Vec<(&str, String, String)> = Vec::new();
    if let Some(record) = run.named.last() {
        let of = run.steps_asked.map(|n| format!("of {n}")).unwrap_or_default();
        tiles.push(("steps", record.step.to_string(), of));
    }
    let loss = series(Metric::Loss);
    if let Some((_, value)) = loss.last() {
        let first = loss.finite().next().map(|v| format!("from {}", Format::Plain.write(v))).unwrap_or_default();
        tiles.push(("loss", Format::Plain.write(value), first));
    }
    if let Some((_, value)) = last(Metric::EvalLoss) {
        let perplexity = format!("perplexity {}", Format::Plain.write(value.exp()));
        tiles.push(("held-out loss", Format::Plain.write(value), perplexity));
    }
    if let Some((_, value)) = last(Metric::TokensSeen) {
        tiles.push(("tokens seen", Format::Count.write(value), String::new()));
    }
    if let Some(value) = series(Metric::TokensPerSecond).quantile(0.5) {
        tiles.push(("tokens/s", Format::Count.write(value), "median".into()));
    }
    if let Some(value) = series(Metric::Mfu).quantile(0.5) {
        tiles.push(("MFU", Format::Percent.write(value), "median, causal attention".into()));
    }
    if let Some(value) = series(Metric::MemoryBytes).quantile(1.0) {
        let predicted = last(Metric::PredictedMemoryBytes).map(|p| format!("predicted {}", Format::Bytes.write(p.1)));
        tiles.push(("peak memory per rank", Format::Bytes.write(value), predicted.unwrap_or_default()));
    }
    tiles.extend(rl::tiles(&run.named));
    if let Some(duration) = &run.duration {
        tiles.push(("wall time", duration.clone(), String::new()));
    }
    let skipped = last(Metric::SkippedSteps).map_or(0.0, |s| s.1);
    let restarts = run.events.iter().filter(|e| e.kind == EventKind::Restart).count();
    if !run.records.is_empty() {
        tiles.push(("skipped steps", skipped.to_string(), String::new()));
        tiles.push(("restarts", restarts.to_string(), String::new()));
    }
    let mut out = String::from("<div class=\"tiles\">");
    for (label, value, note) in tiles {
        let (label, value, note) = (escape(label), escape(&value), escape(&note));
        let _ = write!(out, "<div class=\"tile\"><span>{label}</span><b>{value}</b><small>{note}</small></div>");
    }
    out + "</div>\n"
}

fn charts(run: &Run, frame: &Frame) -> String {
    if rl::is_of_rl(&run.named) {
        return rl::charts(&run.named, frame);
    }
    let line = |metric, name: &str, color| Line {
        name: name.to_owned(),
        color,
        series: Series::of(&run.records, metric),
        dots: false,
    };
    let held_out = Line { dots: true, ..line(Metric::EvalLoss, "held out", 1) };
    let names = ["data", "forward", "backward", "communication", "optimizer", "checkpoint"];
    let colors = [5, 0, 3, 1, 2, 4];
    let parts = Metric::STEP_PARTS.into_iter().zip(names).zip(colors);
    let mut split: Vec<Line> = parts.map(|((metric, name), color)| line(metric, name, color)).collect();
    split.push(Line { name: "other".into(), color: 6, series: rest_of_step(run), dots: false });
    [
        chart::lines("Loss, nats per token", Format::Plain, false, &[line(Metric::Loss, "train", 0), held_out], frame),
        chart::lines("Gradient norm", Format::Plain, true, &[line(Metric::GradNorm, "gradient norm", 3)], frame),
        chart::lines("Learning rate", Format::Plain, true, &[line(Metric::Lr, "learning rate", 2)], frame),
        chart::lines("Tokens per second", Format::Count, true, &[line(Metric::TokensPerSecond, "tokens/s", 0)], frame),
        chart::stacked("Where a step's time goes", Format::Seconds, &split, frame),
        chart::lines(
            "Model FLOPs utilisation",
            Format::Percent,
            true,
            &[line(Metric::Mfu, "causal", 0), line(Metric::MfuFullAttention, "full attention", 1)],
            frame,
        ),
        chart::lines(
            "Peak memory per rank",
            Format::Bytes,
            true,
            &[line(Metric::MemoryBytes, "measured", 5), line(Metric::PredictedMemoryBytes, "predicted", 6)],
            frame,
        ),
    ]
    .concat()
}

/// What a step took beyond its named parts.
fn rest_of_step(run: &Run) -> Series {
    let rest = |r: &crate::MetricRecord| {
        let named: f64 = Metric::STEP_PARTS.into_iter().filter_map(|part| r.get(part)).sum();
        Some((r.step, (r.get(Metric::StepSeconds)? - named).max(0.0)))
    };
    Series { points: run.records.iter().filter_map(rest).collect() }
}

const MAX_SAMPLE_STEPS: usize = 40;
const MAX_SAMPLE_CHARS: usize = 4000;
const MAX_EVENTS: usize = 300;

fn samples(samples: &[SampleRecord]) -> String {
    if samples.is_empty() {
        return String::new();
    }
    let steps: Vec<&[SampleRecord]> = samples.chunk_by(|a, b| a.step == b.step).collect();
    // All of them, or as many spread evenly with the newest among them.
    let keep = steps.len().min(MAX_SAMPLE_STEPS);
    let mut out = String::from("<h2>Samples</h2>\n");
    for i in (0..keep).rev() {
        let group = steps[(i + 1) * steps.len() / keep - 1];
        let open = if i + 1 == keep { " open" } else { "" };
        let _ = write!(out, "<details{open}><summary>after step {}</summary>", group[0].step);
        for sample in group {
            let text: String = sample.text.chars().take(MAX_SAMPLE_CHARS).collect();
            let note =
                if sample.note.is_empty() { String::new() } else { format!("<small>{}</small>", escape(&sample.note)) };
            let (prompt, text) = (escape(&sample.prompt), escape(&text));
            let _ = write!(out, "<pre><span class=\"prompt\">{prompt}</span>{text}{note}</pre>");
        }
        out += "</details>\n";
    }
    out
}

fn events(events: &[EventRecord]) -> String {
    // Saving is the ordinary course; what is not stays visible.
    let told: Vec<&EventRecord> = events.iter().filter(|e| e.kind != EventKind::Saved).collect();
    if told.is_empty() {
        return String::new();
    }
    let mut out = String::from(
        "<h2>Events</h2>\n<div class=\"card scroll\"><table><tr><th>time</th><th>step</th><th>event</th><th></th></tr>",
    );
    let hidden = told.len().saturating_sub(MAX_EVENTS);
    for event in &told[hidden..] {
        let class = match event.kind {
            EventKind::Failure | EventKind::Warning | EventKind::Skipped => "bad",
            EventKind::Done => "good",
            _ => "",
        };
        let step = event.step.map(|s| s.to_string()).unwrap_or_default();
        let kind =
            serde_json::to_value(event.kind).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default();
        let (time, message) = (super::time_text(event.time), escape(&event.message));
        let _ = write!(
            out,
            "<tr><td class=\"n\">{time}</td><td class=\"n\">{step}</td><td class=\"{class}\">{kind}</td><td class=\"m\">{message}</td></tr>"
        );
    }
    out += "</table>";
    if hidden > 0 {
        let _ = write!(out, "<p class=\"none\">{hidden} earlier ones are in events.jsonl</p>");
    }
    out + "</div>\n"
}
