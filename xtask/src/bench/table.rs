//! What a measurement leaves: values of one quantity, their median, a table of them; and a run's records.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs;
use std::path::Path;

/// Steps left out of medians: allocation, and the peers' compilation.
pub const WARM_UP_STEPS: usize = 2;

/// A line of the table: one quantity of one side, one value per round.
pub struct Row {
    pub name: String,
    pub unit: &'static str,
    pub values: Vec<f64>,
}

/// Every record of a run.
pub fn records(run: &Path) -> Result<Vec<Value>> {
    let path = run.join("metrics.jsonl");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let records: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    if records.is_empty() {
        bail!("{} holds no records", path.display());
    }
    Ok(records)
}

/// One metric of every record that has it.
pub fn column(records: &[Value], key: &str) -> Vec<f64> {
    records.iter().filter_map(|record| record[key].as_f64()).collect()
}

/// The values of steps that count; none where there are no more than warm-up steps.
pub fn counted(steps: &[f64]) -> &[f64] {
    steps.get(WARM_UP_STEPS..).unwrap_or_default()
}

/// The value in the middle, or between the two there; not a number where there are none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// Medians with their range; of each group in one unit, the ratio of its first row to each other.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!("{:<42} {:>10}  {:<24} {:>18}  first is\n", "what", "median", "unit", "range");
    let mut first: Option<&Row> = None;
    for row in rows {
        let value = median(&row.values);
        let low = row.values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = row.values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let ours = row.name.starts_with("tangelo");
        let ratio = match first.filter(|first| first.unit == row.unit && !ours) {
            Some(first) => format!("{:.2}x", median(&first.values) / value),
            None => String::new(),
        };
        let range = format!("{low:.2}-{high:.2}");
        let line = format!("{:<42} {value:>10.2}  {:<24} {range:>18}  {ratio}", row.name, row.unit);
        text += line.trim_end();
        text.push('\n');
        if ours {
            first = Some(row);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn the_table_relates_peers_to_us() {
        let row = |name: &str, values: &[f64]| Row { name: name.into(), unit: "tokens/s", values: values.to_vec() };
        let text = table(&[row("tangelo float32", &[200.0, 220.0, 210.0]), row("transformers eager", &[100.0])]);
        assert!(text.contains("210.00") && text.contains("2.10x"), "{text}");
    }

    #[test]
    fn warm_up_steps_do_not_count() {
        assert_eq!(counted(&[9.0, 9.0, 1.0]), [1.0]);
        assert!(counted(&[9.0]).is_empty());
    }
}
