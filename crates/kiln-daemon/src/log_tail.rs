//! The last lines an instance printed.

use kiln_model::InstanceId;
use kiln_runtime::Runtime;

/// At most `lines` lines, oldest first; what can't be read is said in a line.
pub fn read(runtime: &Runtime, id: &InstanceId, lines: usize) -> Vec<String> {
    let mut last = std::collections::VecDeque::with_capacity(lines);
    let mut reader = runtime.log(id);
    loop {
        match reader.next_record() {
            Ok(Some(record)) => {
                if last.len() == lines {
                    last.pop_front();
                }
                last.push_back(record.text);
            }
            Ok(None) => return last.into(),
            Err(error) => {
                last.push_back(format!("(the rest of its log could not be read: {error})"));
                return last.into();
            }
        }
    }
}
