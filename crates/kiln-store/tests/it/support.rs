use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use kiln_model::Digest;
use kiln_oci::BlobWrite;
use kiln_oci::layer::{Entry, EntryKind, LayerWriter, WrittenLayer};
use kiln_oci::manifest::{ConfigDocument, Descriptor, Manifest, media_type, write_config};
use kiln_store::Store;
use tempfile::TempDir;

/// Says that a test did not run; in strict runs (CI) that is a failure.
pub fn skip(why: &str) {
    assert!(
        std::env::var_os("KILN_TEST_STRICT").is_none_or(|v| v != "1"),
        "would be skipped: {why}"
    );
    eprintln!("SKIPPED: {why}");
}

pub fn store() -> (TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    (dir, store)
}

pub fn put(store: &Store, content: impl AsRef<[u8]>) -> Digest {
    store.put_object(&mut content.as_ref()).unwrap().0
}

pub fn put_blob(store: &Store, content: impl AsRef<[u8]>) -> Digest {
    store.write(None, &mut content.as_ref()).unwrap().0
}

/// Something to put into a layer.
pub enum Item {
    Entry(Entry, Vec<u8>),
    Whiteout(Vec<u8>),
    Opaque(Vec<u8>),
}

pub fn entry(path: &str, mode: u32, kind: EntryKind) -> Item {
    Item::Entry(bare(path, mode, kind), Vec::new())
}

pub fn bare(path: &str, mode: u32, kind: EntryKind) -> Entry {
    Entry {
        path: path.into(),
        kind,
        mode,
        uid: 0,
        gid: 0,
        mtime: 1_600_000_000,
        xattrs: BTreeMap::new(),
    }
}

pub fn file(path: &str, content: &str) -> Item {
    let size = content.len() as u64;
    Item::Entry(
        bare(path, 0o644, EntryKind::File { size }),
        content.as_bytes().into(),
    )
}

pub fn dir(path: &str) -> Item {
    entry(path, 0o755, EntryKind::Dir)
}

pub fn symlink(path: &str, target: &str) -> Item {
    let target = target.into();
    entry(path, 0o777, EntryKind::Symlink { target })
}

pub fn hardlink(path: &str, target: &str) -> Item {
    let target = target.into();
    entry(path, 0o644, EntryKind::Hardlink { target })
}

pub fn whiteout(path: &str) -> Item {
    Item::Whiteout(path.into())
}

/// A layer blob in the store.
pub fn layer(store: &Store, items: &[Item]) -> WrittenLayer {
    let mut writer = LayerWriter::new(Vec::new(), None).unwrap();
    for item in items {
        match item {
            Item::Entry(entry, content) => writer.entry(entry, &mut content.as_slice()).unwrap(),
            Item::Whiteout(path) => writer.whiteout(path).unwrap(),
            Item::Opaque(path) => writer.opaque(path).unwrap(),
        }
    }
    let (written, bytes) = writer.finish().unwrap();
    assert_eq!(put_blob(store, bytes), written.digest);
    written
}

/// A manifest over these layers, in the store, with all it needs.
pub fn manifest(store: &Store, layers: &[WrittenLayer]) -> Digest {
    let mut config = ConfigDocument {
        diff_ids: layers.iter().map(|layer| layer.diff_id).collect(),
        ..ConfigDocument::default()
    };
    config.config.platform = "linux/amd64".into();
    config.config.env = vec![("PATH".into(), "/bin".into())];
    let config = write_config(&config);
    let digest = put_blob(store, &config);
    let config = Descriptor::new(media_type::OCI_CONFIG, digest, config.len() as u64);
    let layers = layers.iter().map(WrittenLayer::descriptor).collect();
    put_blob(store, Manifest::new(config, layers).to_bytes())
}

/// Every regular file below `folder`.
pub fn files_below(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_below(&path));
        } else {
            found.push(path);
        }
    }
    found.sort();
    found
}

pub fn text(mut content: impl Read) -> String {
    let mut text = String::new();
    content.read_to_string(&mut text).unwrap();
    text
}
