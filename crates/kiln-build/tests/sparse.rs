//! Files that say that they are larger than any disk: refused by name before anything is
//! read of them, wherever they come from.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod world;

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use world::{World, busybox, context, sandboxes, world};

const TIB: u64 = 1 << 40;
/// What a build that is refused may leave on disk: records, and what came before.
const LITTLE: u64 = 16 << 20;

/// A hole, and a word at its end.
fn sparse(path: &Path, size: u64) {
    let mut file = File::create(path).unwrap();
    file.seek(SeekFrom::Start(size - 4)).unwrap();
    file.write_all(b"last").unwrap();
}

fn on_disk(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).unwrap().flatten();
    let sizes = entries.map(|entry| match entry.metadata().unwrap() {
        meta if meta.is_dir() => on_disk(&entry.path()),
        meta => meta.blocks() * 512,
    });
    sizes.sum()
}

#[track_caller]
fn refused(world: &World, error: &str, says: &[&str]) {
    for text in says {
        assert!(error.contains(text), "{text}: {error}");
    }
    let left = on_disk(world.root.path());
    assert!(left < LITTLE, "{left} bytes are left");
}

#[test]
fn a_file_of_the_context_is_refused_and_what_is_not_copied_is_not_asked() {
    let one = world();
    let folder = context(&[("app/f", "x")]);
    sparse(&folder.path().join("app/disk.img"), TIB);
    let error = one.build(folder.path(), "FROM scratch\nCOPY app /app\n");
    let told = format!("it would take {TIB} bytes, and there is room for ");
    refused(
        &one,
        &error.unwrap_err(),
        &["app/disk.img", &told, "line 2"],
    );
    one.build(folder.path(), "FROM scratch\nCOPY app/f /\n")
        .unwrap();
    fs::write(folder.path().join(".dockerignore"), "**/*.img\n").unwrap();
    let image = one
        .build(folder.path(), "FROM scratch\nCOPY app /app\n")
        .unwrap();
    assert!(one.tree(&image).get("app/disk.img").is_none());
}

#[test]
fn one_that_a_command_makes_is_refused() {
    if !sandboxes() {
        return;
    }
    let one = world();
    let (folder, base) = busybox();
    let text = format!("{base}RUN truncate -s {TIB} /var.img\n");
    let error = one.build(folder.path(), &text).unwrap_err();
    let told = format!("it would take {TIB} bytes, and there is room for ");
    refused(&one, &error, &["var.img", &told, "line 8"]);
}

fn tar(folder: &Path, format: &str, file: &str) {
    let mut tar = Command::new("tar");
    tar.args(["--sparse", format, "-cf", "all.tar", file]);
    assert!(tar.current_dir(folder).status().unwrap().success());
}

#[test]
fn one_in_an_archive_is_refused_and_a_small_one_is_whole() {
    let one = world();
    let folder = context(&[]);
    let text = "FROM scratch\nADD all.tar /\n";
    sparse(&folder.path().join("big"), TIB);
    tar(folder.path(), "--format=gnu", "big");
    let length = fs::metadata(folder.path().join("all.tar")).unwrap().len();
    assert!(length < 64 << 10, "{length}");
    let error = one.build(folder.path(), text).unwrap_err();
    refused(
        &one,
        &error,
        &["the archive's content is larger than", "line 2"],
    );

    sparse(&folder.path().join("small"), 3 << 20);
    tar(folder.path(), "--format=gnu", "small");
    let image = one.build(folder.path(), text).unwrap();
    let content = one.text(&image, "small");
    assert_eq!(content.len(), 3 << 20);
    assert!(content.ends_with("\0last"));

    // A form of its own, which has the pieces' list in the content.
    tar(folder.path(), "--format=posix", "small");
    let error = one.build(folder.path(), text).unwrap_err();
    refused(
        &one,
        &error,
        &["a file with holes", "--format=gnu", "line 2"],
    );
}
