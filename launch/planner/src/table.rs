//! Aligned columns and human units.

/// Which side of a column its cells stand on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// Text in aligned columns, two spaces apart.
#[derive(Clone, Debug)]
pub struct Table<const N: usize> {
    align: [Align; N],
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    /// A table with a line of headings.
    pub fn new(columns: &[(&str, Align); N]) -> Table<N> {
        Table { align: columns.map(|c| c.1), rows: vec![columns.map(|c| c.0.to_owned())] }
    }

    /// Adds a line.
    pub fn row(&mut self, cells: [String; N]) {
        self.rows.push(cells);
    }

    /// The lines, each ended by a newline, none by a space.
    pub fn render(&self) -> String {
        let width = |column: usize| self.rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..N).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let cells = row.iter().zip(&widths).zip(&self.align).map(|((cell, &width), align)| match align {
                Align::Left => format!("{cell:<width$}"),
                Align::Right => format!("{cell:>width$}"),
            });
            text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
            text.push('\n');
        }
        text
    }
}

/// Bytes in binary units: `1.50 GiB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = n as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if n < 1024 { format!("{n} B") } else { format!("{} {}", digits(value), UNITS[unit]) }
}

/// A count in decimal units: `134.5 M`, `7.24 G`.
pub fn count(n: f64) -> String {
    const UNITS: [&str; 6] = ["k", "M", "G", "T", "P", "E"];
    if n < 1000.0 {
        return format!("{n:.0}");
    }
    let mut value = n / 1000.0;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{} {}", digits(value), UNITS[unit])
}

/// Three or four significant digits.
fn digits(value: f64) -> String {
    if value < 9.995 { format!("{value:.2}") } else { format!("{value:.1}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!(
            [0, 1023, 1024, 1536, (1 << 20) - 1].map(bytes),
            ["0 B", "1023 B", "1.00 KiB", "1.50 KiB", "1.00 MiB"]
        );
        assert_eq!(bytes(3 << 30), "3.00 GiB");
        assert_eq!(
            [7.0, 999.0, 1000.0, 134_515_008.0, 7.2417e9].map(count),
            ["7", "999", "1.00 k", "134.5 M", "7.24 G"]
        );
    }
}
