//! The report of whole, half, empty and odd runs.

use super::*;
use crate::{EventLog, Metric, MetricsWriter, NamedMetrics, SampleLog};

fn page(folder: &Path) -> String {
    let path = write(folder).unwrap();
    let text = std::fs::read_to_string(path).unwrap();
    // Nothing that a browser would fetch.
    for outside in ["http://", "https://", "src=", "href=", "@import", "url("] {
        let found = text.replace("http://www.w3.org/2000/svg", "");
        assert!(!found.contains(outside), "the page refers to something outside: {outside}");
    }
    assert!(!text.contains("NaN"), "a position or a number that is none");
    text
}

/// A run with everything that can be recorded.
fn write_run(folder: &Path, steps: u64) {
    let config = "[job]\ndescription = \"a <b> & c\"\n[model]\nname = \"llama\"\nhidden_size = 64\nnum_hidden_layers = 2\n[training]\nsteps = 100\n";
    std::fs::write(folder.join(files::CONFIG), config).unwrap();
    let mut events = EventLog::open(folder);
    events.append(EventKind::Start, None, "2 ranks");
    let mut metrics = MetricsWriter::open(folder, None, 0);
    for step in 1..=steps {
        let values: Vec<(Metric, f64)> =
            Metric::ALL.iter().enumerate().map(|(i, &m)| (m, (i + 1) as f64 + 1.0 / step as f64)).collect();
        metrics.record(step, &values);
    }
    events.append(EventKind::Restart, Some(steps / 2), "restart 1");
    let mut samples = SampleLog::open(folder, 0);
    let text = "alert(1)</script>\u{0}".into();
    samples.append(&SampleRecord { step: 5, prompt: "<script>".into(), text, note: "reward <b>".into() });
    events.append(EventKind::Done, Some(steps), "all ranks ended well");
}

#[test]
fn a_whole_run() {
    let folder = tempfile::tempdir().unwrap();
    write_run(folder.path(), 10);
    let page = page(folder.path());
    for part in ["Loss", "Gradient norm", "Learning rate", "Tokens per second", "time goes", "utilisation", "memory"] {
        assert!(page.contains(part), "{part}");
    }
    assert_eq!(page.matches("<svg").count(), 7);
    assert!(page.contains("class=\"status good\">done") && page.contains("class=\"restart\""));
    assert!(page.contains("a &lt;b&gt; &amp; c") && page.contains("2 layers of width 64"));
    assert!(page.contains("<small>reward &lt;b&gt;</small>"), "nor are notes");
    assert!(page.contains("&lt;script&gt;") && page.contains("alert(1)&lt;/script&gt;"), "samples are not code");
}

#[test]
fn a_hundred_thousand_steps_make_no_larger_page_than_a_thousand() {
    let sizes = [1000, 100_000].map(|steps| {
        let folder = tempfile::tempdir().unwrap();
        write_run(folder.path(), steps);
        page(folder.path()).len()
    });
    // Longer step numbers in the text, and nothing else.
    assert!(sizes[1] < sizes[0] * 6 / 5, "{sizes:?}");
    assert!(sizes[1] < 1 << 19, "{sizes:?}");
}

#[test]
fn a_run_of_reinforcement_learning() {
    let folder = tempfile::tempdir().unwrap();
    let mut metrics = NamedMetrics::open(folder.path(), None, 0);
    let check = [("val-core/sums/reward/mean@4", 0.25), ("val-core/sums/reward/pass@4", 0.5)];
    let named = |all: &[(&str, f64)]| all.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect::<Vec<_>>();
    metrics.record(0, &named(&check));
    for step in 1..=3u64 {
        let reward = step as f64 / 8.0;
        metrics.record(
            step,
            &named(&[
                ("critic/score/mean", reward),
                ("reward/numeric/mean", reward),
                ("reward/length/mean", 0.5),
                ("actor/ppo_kl", 0.01),
                ("response_length/mean", 7.5),
                ("critic/vf_explained_var", -1e6),
                ("timing_s/gen", 1.0),
            ]),
        );
    }
    let mut samples = SampleLog::open(folder.path(), 0);
    let note = "reward 1.05 (numeric 1, length 0.5)".into();
    samples.append(&SampleRecord { step: 3, prompt: "1 + 1 =\n".into(), text: "2".into(), note });
    let page = page(folder.path());
    for part in ["Reward", "sums mean@4", "sums pass@4", "numeric", "KL of an update", "Length of completions"] {
        assert!(page.contains(part), "{part}");
    }
    assert!(page.contains("<small>reward 1.05 (numeric 1, length 0.5)</small>"));
    // A critic that is far off does not flatten its own curve.
    assert!(!page.contains("-1e6") && page.contains("explained variance"));
    assert!(page.contains("from 0.125"), "the tile says where the reward came from");
}

#[test]
fn runs_that_have_little_to_show() {
    let folder = tempfile::tempdir().unwrap();
    assert!(page(folder.path()).contains("Nothing recorded yet"));

    std::fs::write(folder.path().join(files::CONFIG), "not = [toml").unwrap();
    std::fs::write(folder.path().join(files::METRICS), "{\"step\":1,\"time\":5,\"loss\":\"NaN\"}\n{\"step\":2,\"lo")
        .unwrap();
    let half = page(folder.path());
    assert!(half.contains("not finished") && half.contains("no finite value recorded"), "{half}");
    assert!(half.contains("not = [toml"));

    EventLog::open(folder.path()).append(EventKind::Failure, Some(1), "rank 1 <died>");
    let failed = page(folder.path());
    assert!(failed.contains("status bad") && failed.contains("rank 1 &lt;died&gt;"));
}

#[test]
fn durations_and_times_are_readable() {
    let until = |time| duration_text(0.0, &[MetricRecord { step: 1, time, values: vec![] }], &[]).unwrap();
    assert_eq!([59.4, 61.0, 7321.0].map(until), ["59 s", "1 min 1 s", "2 h 2 min"]);
    assert_eq!(time_text(1_772_366_405.7), "2026-03-01 12:00:05 UTC");
}
