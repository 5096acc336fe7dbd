//! Samples and the table they end in.

use std::time::Duration;

/// Times of one measure.
#[derive(Default)]
pub struct Samples(Vec<Duration>);

impl Samples {
    pub fn add(&mut self, sample: Duration) {
        self.0.push(sample);
    }
}

pub struct Row {
    pub what: String,
    pub who: String,
    pub value: String,
    pub worst: String,
    /// What it is to be at most, where an aim is set.
    pub bar: String,
    pub note: String,
}

impl Row {
    pub fn times(what: &str, who: &str, samples: &Samples, bar: Option<Duration>) -> Self {
        let mut sorted = samples.0.clone();
        Self {
            what: what.into(),
            who: who.into(),
            value: milliseconds(median(&mut sorted)),
            worst: milliseconds(sorted.last().copied().unwrap_or_default()),
            bar: bar.map(milliseconds).unwrap_or_default(),
            note: format!("{} runs", sorted.len()),
        }
    }

    pub fn not_run(what: &str, who: &str, why: &str) -> Self {
        Self {
            what: what.into(),
            who: who.into(),
            value: "not run".into(),
            worst: String::new(),
            bar: String::new(),
            note: why.into(),
        }
    }
}

fn milliseconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

/// Sorts, and gives the middle one (the upper of two).
pub fn median<T: Ord + Copy + Default>(samples: &mut [T]) -> T {
    samples.sort_unstable();
    samples.get(samples.len() / 2).copied().unwrap_or_default()
}

pub fn render(rows: &[Row]) -> String {
    let head = ["measure", "who", "median", "worst", "aim", "note"].map(String::from);
    let lines: Vec<[String; 6]> = rows
        .iter()
        .map(|r| [&r.what, &r.who, &r.value, &r.worst, &r.bar, &r.note].map(Clone::clone))
        .collect();
    let all: Vec<&[String; 6]> = std::iter::once(&head).chain(&lines).collect();
    let width = |column: usize| {
        all.iter()
            .map(|l| l[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..6).map(width).collect();
    let mut out = String::new();
    for (at, line) in all.iter().enumerate() {
        out.push_str(&row(line, &widths));
        if at == 0 {
            let dashes: Vec<String> = widths.iter().map(|w| "-".repeat(*w)).collect();
            out.push_str(&format!("| {} |\n", dashes.join(" | ")));
        }
    }
    out
}

fn row(cells: &[String; 6], widths: &[usize]) -> String {
    let padded: Vec<String> = cells
        .iter()
        .zip(widths)
        .map(|(cell, width)| format!("{cell:width$}"))
        .collect();
    format!("| {} |\n", padded.join(" | "))
}

/// What it was measured on, and how busy that was.
pub fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let model = read("/proc/cpuinfo")
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("unknown CPU".into(), |l| {
            l.trim_start_matches(['\t', ' ', ':']).to_owned()
        });
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    let load = read("/proc/loadavg");
    let load = load.split(' ').next().unwrap_or("?");
    format!(
        "{cores} × {model}, Linux {}, load {load} at the end",
        kernel.trim()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_medians_and_lines_up() {
        let mut samples = Samples::default();
        for n in [9, 1, 5] {
            samples.add(Duration::from_millis(n));
        }
        let rows = [
            Row::times("a", "kiln", &samples, Some(Duration::from_millis(60))),
            Row::not_run("a", "docker", "it is not installed"),
        ];
        let text = render(&rows);
        assert!(
            text.contains("| 5.0 ms  | 9.0 ms | 60.0 ms | 3 runs "),
            "{text}"
        );
        assert!(text.contains("not run"), "{text}");
        let mut widths = text.lines().map(|l| l.chars().count());
        let first = widths.next();
        assert!(widths.all(|w| Some(w) == first), "{text}");
    }
}
