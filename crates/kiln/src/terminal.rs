//! The lower end of a terminal that is drawn anew while lines scroll away above it.

use std::io::Write;

use rustix::termios::tcgetwinsize;

/// Rows on standard error which the next drawing takes the place of.
#[derive(Default)]
pub struct Block {
    drawn: usize,
}

impl Block {
    /// Prints `line` above the block and draws its rows anew.
    pub fn draw(&mut self, line: Option<&str>, rows: &[String]) {
        let mut out = String::new();
        if self.drawn > 0 {
            out.push_str(&format!("\x1b[{}A\x1b[J", self.drawn));
        }
        if let Some(line) = line {
            out.push_str(line);
            out.push('\n');
        }
        for row in rows {
            // What others wrote must not move the cursor.
            out.push_str(&row.replace(|c: char| c.is_control(), " "));
            out.push('\n');
        }
        self.drawn = rows.len();
        let mut stderr = std::io::stderr().lock();
        // A terminal that has gone away must not end the work.
        let _ = stderr
            .write_all(out.as_bytes())
            .and_then(|()| stderr.flush());
    }
}

/// Columns and lines of standard error; 80 by 24 where it does not say.
pub fn size() -> (usize, usize) {
    let said = tcgetwinsize(std::io::stderr()).ok();
    let or = |said: Option<u16>, usual| match said {
        None | Some(0) => usual,
        Some(n) => usize::from(n),
    };
    (
        or(said.map(|s| s.ws_col), 80),
        or(said.map(|s| s.ws_row), 24),
    )
}
