//! Aligned text tables.

/// Bytes in the unit that keeps the number short.
pub(crate) fn bytes(count: usize) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A header, a line, and rows; columns two spaces apart and as wide as their longest cell.
pub(crate) fn render<const COLUMNS: usize>(
    header: [&str; COLUMNS],
    rows: impl Iterator<Item = [String; COLUMNS]>,
) -> String {
    let mut cells = vec![header.map(str::to_owned)];
    cells.extend(rows);
    let width = |column: usize| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; COLUMNS] = std::array::from_fn(width);
    let line = widths.map(|width| "-".repeat(width));
    cells.insert(1, line);
    let lines: Vec<String> = cells
        .iter()
        .map(|row| {
            let padded: Vec<String> =
                row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            padded.join("  ").trim_end().to_owned()
        })
        .collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_short() {
        let all = [0, 1023, 1024, 1536, 64 << 20, 3 << 40, usize::MAX].map(bytes);
        assert_eq!(all, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "64.0 MiB", "3.0 TiB", "16777216.0 TiB"]);
    }

    #[test]
    fn columns_align() {
        let rows = [["cpu", "chosen"], ["chunked", "refused"]].map(|row| row.map(str::to_owned));
        assert_eq!(
            render(["name", "verdict"], rows.into_iter()),
            "name     verdict\n-------  -------\ncpu      chosen\nchunked  refused"
        );
    }
}
