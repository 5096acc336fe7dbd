//! Packs the relative relocations: the start of every command applies them.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Linkers that don't know it say so and go on.
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
}
