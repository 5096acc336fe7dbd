//! npm's cache, without the times at which it was written: each line of its index is a
//! JSON object behind the SHA-1 of its text.

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};

/// Within the path of an index's files (cacache, version 5).
const INDEX: &[u8] = b"/_cacache/index-v5/";
const TIME: &str = "\"time\":";

/// The content of an npm cache's index with its times at the epoch (seconds); any other
/// file's as it is.
pub(super) fn settled(path: &[u8], content: Vec<u8>, epoch: i64) -> Vec<u8> {
    if !path.windows(INDEX.len()).any(|part| part == INDEX) {
        return content;
    }
    let Ok(text) = std::str::from_utf8(&content) else {
        return content;
    };
    let time = (epoch.max(0) * 1000).to_string();
    let lines = text.split('\n').map(|line| settled_line(line, &time));
    let lines: Vec<String> = lines.collect();
    lines.join("\n").into_bytes()
}

fn settled_line(line: &str, time: &str) -> String {
    let hash = |text: &str| hex::encode(digest(&SHA1_FOR_LEGACY_USE_ONLY, text.as_bytes()));
    let known = line
        .split_once('\t')
        .filter(|(sum, json)| hash(json) == *sum);
    let Some((_, json)) = known else {
        return line.to_owned();
    };
    let mut parts = json.split(TIME);
    let mut settled = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let rest = part.trim_start_matches(|c: char| c.is_ascii_digit());
        settled.push_str(TIME);
        // Where it is a number, and no text that reads so.
        settled.push_str(if rest.len() < part.len() { time } else { "" });
        settled.push_str(rest);
    }
    format!("{}\t{settled}", hash(&settled))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_settled_and_the_sum_is_right() {
        let path = b"root/.npm/_cacache/index-v5/aa/bb/cc";
        let entry = |time: &str| {
            let json =
                format!("{{\"key\":\"k\",\"time\":{time},\"metadata\":{{\"time\":{time}}}}}");
            let sum = hex::encode(digest(&SHA1_FOR_LEGACY_USE_ONLY, json.as_bytes()));
            format!("\n{sum}\t{json}")
        };
        let settle = |text: String, path: &[u8]| settled(path, text.into_bytes(), 7);
        assert_eq!(settle(entry("1764000"), path), entry("7000").into_bytes());
        let other = entry("1764000");
        assert_eq!(settle(other.clone(), b"root/index"), other.into_bytes());
        let broken = "\n00\t{\"time\":1}".to_owned();
        assert_eq!(settle(broken.clone(), path), broken.into_bytes());
    }
}
