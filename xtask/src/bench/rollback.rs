//! Going back: from the command to the first byte of the release before.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::Failure;
use super::bed::Bed;
use super::table::{Row, Samples};

const PAGES: [&str; 2] = ["the page before\n", "the page after\n"];
const LIMIT: Duration = Duration::from_secs(30);

/// Each run goes to the release that the last one came from.
pub fn first_byte(bed: &Bed, runs: usize) -> Result<Row, Failure> {
    for page in PAGES {
        bed.page(page)?;
    }
    let mut samples = Samples::default();
    for run in 0..runs {
        let wanted = PAGES[run % 2];
        let begun = Instant::now();
        let rollback = bed.begin(&["rollback", "-e", "bench"])?;
        while page(bed)? != wanted {
            if begun.elapsed() > LIMIT {
                return Err("the release before does not come back".into());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        samples.add(begun.elapsed());
        let ended = rollback.wait_with_output()?;
        if !ended.status.success() {
            return Err(String::from_utf8_lossy(&ended.stderr).into());
        }
    }
    let bar = Some(Duration::from_millis(500));
    let what = "kiln rollback to the first byte";
    Ok(Row::times(what, "kiln", &samples, bar))
}

fn page(bed: &Bed) -> Result<String, Failure> {
    let mut stream = TcpStream::connect(bed.address)?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").ok_or("no HTTP answer")?;
    Ok(body.to_owned())
}
