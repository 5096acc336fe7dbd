//! The last lines an instance printed.

use kiln_model::InstanceId;
use kiln_runtime::Runtime;

/// At most `lines` lines, oldest first; what can't be read is said in a line.
pub fn read(runtime: &Runtime, id: &InstanceId, lines: usize) -> Vec<String> {
    match runtime.log_tail(id, lines) {
        Ok(records) => records.into_iter().map(|r| r.text).collect(),
        Err(error) => vec![format!("(its log could not be read: {error})")],
    }
}
