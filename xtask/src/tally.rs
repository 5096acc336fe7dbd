//! Counts what test runners print. A test that ran but says `SKIPPED: why` is skipped,
//! not passed; a runner that ends without a result has failed.

/// What a test says (on a line of its own) when it can't run here.
const MARK: &str = "SKIPPED:";

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub passed: u64,
    pub failed: u64,
    pub skipped: u64,
    pub failures: Vec<String>,
    /// Who was skipped, and why.
    pub reasons: Vec<String>,
}

impl Tally {
    pub fn pass(&mut self) {
        self.passed += 1;
    }

    pub fn fail(&mut self, what: &str) {
        self.failed += 1;
        self.failures.push(what.to_owned());
    }

    pub fn skip(&mut self, what: &str) {
        self.skipped += 1;
        self.reasons.push(what.to_owned());
    }

    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.failures.extend(other.failures);
        self.reasons.extend(other.reasons);
    }

    /// A test that counted as passed has said that it could not run.
    fn retract(&mut self, name: &str, line: &str) {
        self.passed = self.passed.saturating_sub(1);
        let why = line.split_once(MARK).map_or("", |(_, why)| why.trim());
        self.skip(&format!("{name}: {why}"));
    }
}

/// Reads a runner's output line by line; says which lines are worth showing.
pub trait Runner {
    fn line(&mut self, line: &str) -> bool;
    /// `ended_well`: the runner's own exit status.
    fn finish(self: Box<Self>, ended_well: bool) -> Tally;
}

/// `cargo nextest run --success-output immediate`.
#[derive(Default)]
pub struct Nextest {
    tally: Tally,
    /// The passed test whose output follows, until it has said that it was skipped.
    passed: Option<String>,
    /// Between a passed test's status line and the next one.
    quiet: bool,
    marked: Vec<(String, String)>,
    summary: bool,
}

impl Runner for Nextest {
    fn line(&mut self, line: &str) -> bool {
        if self.summary {
            return false;
        }
        if let Some((status, name)) = status_line(line) {
            let passed = ["PASS", "LEAK"].contains(&status);
            self.quiet = passed;
            self.passed = passed.then(|| name.to_owned());
            if !passed && !["SLOW", "START", "TERMINATING"].contains(&status) {
                self.tally.failures.push(name.to_owned());
            }
            return true;
        }
        if let Some(counts) = summary(line) {
            self.summary = true;
            (self.tally.passed, self.tally.failed, self.tally.skipped) = counts;
            for (name, line) in std::mem::take(&mut self.marked) {
                self.tally.retract(&name, &line);
            }
            return true;
        }
        if line.contains(MARK)
            && let Some(name) = self.passed.take()
        {
            self.marked.push((name, line.to_owned()));
            return true;
        }
        !self.quiet
    }

    fn finish(mut self: Box<Self>, ended_well: bool) -> Tally {
        if !self.summary {
            self.tally.failed = self.tally.failures.len() as u64;
            self.tally.fail("cargo nextest ended without a summary");
        } else if !ended_well && self.tally.failed == 0 {
            self.tally.fail("cargo nextest failed");
        }
        self.tally
    }
}

/// `PASS [   0.021s] ( 1/10) crate::binary test` → status and name.
fn status_line(line: &str) -> Option<(&str, &str)> {
    let (status, rest) = line.trim_start().split_once(" [")?;
    let known = status
        .chars()
        .all(|c| c.is_ascii_uppercase() || " +-".contains(c));
    if status.is_empty() || !known || !line.starts_with("   ") {
        return None;
    }
    let (time, name) = rest.split_once(']')?;
    let time = time.trim_start_matches(['>', ' ']).strip_suffix('s')?;
    time.parse::<f64>().ok()?;
    let name = name.trim_start();
    let name = match name.strip_prefix('(') {
        Some(counted) => counted.split_once(") ")?.1,
        None => name,
    };
    Some((status, name.trim()))
}

/// `Summary [ 3.4s] 10 tests run: 8 passed (1 slow), 1 failed, 1 timed out, 0 skipped` →
/// passed, failed, skipped.
fn summary(line: &str) -> Option<(u64, u64, u64)> {
    let counts = line.trim_start().strip_prefix("Summary [")?;
    let (head, counts) = counts.split_once(" run: ")?;
    let run = head.split_once("] ")?.1;
    // `5/10 tests` when it was cut short.
    let run: u64 = run.split([' ', '/']).next()?.parse().ok()?;
    let number = |word: &str| -> u64 {
        let before = counts.split(word).next().filter(|b| b.len() < counts.len());
        let before = before.unwrap_or("").trim_end();
        before
            .rsplit([' ', ',', '('])
            .next()
            .and_then(|n| n.parse().ok())
            .unwrap_or(0)
    };
    let passed = number("passed");
    Some((passed, run.saturating_sub(passed), number("skipped")))
}

/// `cargo test -- --show-output`.
#[derive(Default)]
pub struct Libtest {
    tally: Tally,
    successes: bool,
    test: Option<String>,
    marked: Vec<(String, String)>,
}

impl Runner for Libtest {
    fn line(&mut self, line: &str) -> bool {
        if let Some(counts) = line.strip_prefix("test result: ") {
            self.result(counts);
            return true;
        }
        match line {
            "successes:" => self.successes = true,
            "failures:" => self.successes = false,
            _ => {}
        }
        let header = line
            .strip_prefix("---- ")
            .and_then(|l| l.strip_suffix(" stdout ----"));
        if let Some(name) = header {
            self.test = Some(name.to_owned());
            if !self.successes {
                self.tally.failures.push(name.to_owned());
            }
            return !self.successes;
        }
        if self.successes {
            if line.contains(MARK)
                && let Some(name) = self.test.take()
            {
                self.marked.push((name, line.to_owned()));
                return true;
            }
            return false;
        }
        !(line.starts_with("test ") && line.ends_with(" ... ok"))
    }

    fn finish(mut self: Box<Self>, ended_well: bool) -> Tally {
        if !ended_well && self.tally.failed == 0 {
            self.tally
                .fail("cargo test: a test program ended without a result");
        }
        self.tally
    }
}

impl Libtest {
    /// `ok. 12 passed; 0 failed; 1 ignored; …`
    fn result(&mut self, counts: &str) {
        let counts = counts.split_once(". ").map_or(counts, |(_, counts)| counts);
        for count in counts.split("; ") {
            let Some((number, word)) = count.split_once(' ') else {
                continue;
            };
            let number: u64 = number.parse().unwrap_or(0);
            match word {
                "passed" => self.tally.passed += number,
                "failed" => self.tally.failed += number,
                "ignored" => self.tally.skipped += number,
                _ => {}
            }
        }
        for (name, line) in std::mem::take(&mut self.marked) {
            self.tally.retract(&name, &line);
        }
        (self.successes, self.test) = (false, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(mut runner: Box<dyn Runner>, text: &str, well: bool) -> (Tally, Vec<String>) {
        let shown = text
            .lines()
            .filter(|line| runner.line(line))
            .map(ToOwned::to_owned);
        let shown = shown.collect();
        (runner.finish(well), shown)
    }

    const NEXTEST: &str = "\
────────────
    Starting 4 tests across 2 binaries
        PASS [   0.021s] (1/4) kiln-a::it one
  stdout ───
    running 1 test
  stderr ───
    SKIPPED: needs root
    SKIPPED: twice
        PASS [   0.275s] (2/4) kiln-a tests::two
        SLOW [> 60.000s] (───) kiln-a tests::four
        FAIL [   2.099s] (3/4) kiln-b three
  stderr ───
    SKIPPED: and yet it failed
     TIMEOUT [ 120.000s] (4/4) kiln-a tests::four
────────────
     Summary [   3.419s] 4 tests run: 2 passed (1 slow), 1 failed, 1 timed out, 3 skipped
        FAIL [   2.099s] (3/4) kiln-b three
";

    #[test]
    fn nextest_is_counted_honestly() {
        let (tally, shown) = read(Box::<Nextest>::default(), NEXTEST, false);
        assert_eq!((tally.passed, tally.failed, tally.skipped), (1, 2, 4));
        assert_eq!(tally.failures, ["kiln-b three", "kiln-a tests::four"]);
        assert_eq!(tally.reasons, ["kiln-a::it one: needs root"]);
        assert!(!shown.iter().any(|l| l.contains("running 1 test")));
        assert!(shown.iter().any(|l| l.contains("and yet")));
    }

    #[test]
    fn a_runner_that_breaks_off_has_failed() {
        let cut = &NEXTEST[..NEXTEST.find("        SLOW").unwrap_or(0)];
        assert_eq!(read(Box::<Nextest>::default(), cut, false).0.failed, 1);
        assert_eq!(read(Box::<Nextest>::default(), "", true).0.failed, 1);
        let crashed = "running 2 tests\nerror: test failed, to rerun pass `--lib`\n";
        assert_eq!(read(Box::<Libtest>::default(), crashed, false).0.failed, 1);
    }

    #[test]
    fn libtest_is_counted_honestly() {
        let text = "\
     Running unittests src/lib.rs
running 4 tests
test tests::a ... ok
test tests::b ... ok
test tests::c ... FAILED
test tests::d ... ignored

successes:

---- tests::a stdout ----
SKIPPED: needs nft
SKIPPED: twice

---- tests::b stdout ----
hello


successes:
    tests::a
    tests::b

failures:

---- tests::c stdout ----
SKIPPED: and yet it failed


failures:
    tests::c

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s
     Running tests/it.rs
test result: ok. 7 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s
";
        let (tally, shown) = read(Box::<Libtest>::default(), text, false);
        assert_eq!((tally.passed, tally.failed, tally.skipped), (8, 1, 2));
        assert_eq!(tally.failures, ["tests::c"]);
        assert_eq!(tally.reasons, ["tests::a: needs nft"]);
        assert!(
            !shown
                .iter()
                .any(|l| l == "hello" || l == "test tests::a ... ok")
        );
    }
}
