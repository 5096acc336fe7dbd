use kiln_model::{Digest, ImageConfig};

use crate::blob::BlobWrite;
use crate::layer::{Entry, EntryKind, LayerWriter};
use crate::manifest::{ConfigDocument, Descriptor, Manifest, media_type, write_config};

/// A small true image: two equal layers, gzip and zstd, with one file `/hello`.
#[derive(Clone)]
pub struct SampleImage {
    pub platform: String,
    pub manifest: Vec<u8>,
    pub config: Vec<u8>,
    pub layers: Vec<Vec<u8>>,
    /// The layers' content, uncompressed.
    pub tar: Vec<u8>,
}

impl SampleImage {
    /// `content`: of `/hello`.
    #[allow(clippy::unwrap_used, reason = "a fixture in memory")]
    pub fn new(platform: &str, content: &str) -> Self {
        let entry = Entry {
            path: b"hello".to_vec(),
            kind: EntryKind::File {
                size: content.len() as u64,
            },
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: 0,
            xattrs: std::collections::BTreeMap::new(),
        };
        let mut writer = LayerWriter::new(Vec::new(), None).unwrap();
        writer.entry(&entry, &mut content.as_bytes()).unwrap();
        let (written, zstd) = writer.finish().unwrap();
        let tar = zstd::decode_all(&zstd[..]).unwrap();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gzip, &tar).unwrap();
        let gzip = gzip.finish().unwrap();
        let config = write_config(&ConfigDocument {
            config: ImageConfig {
                platform: platform.into(),
                cmd: vec!["/hello".into()],
                ..ImageConfig::default()
            },
            diff_ids: vec![written.diff_id; 2],
            ..ConfigDocument::default()
        });
        let descriptor = |media_type, bytes: &[u8]| {
            Descriptor::new(media_type, Digest::of(bytes), bytes.len() as u64)
        };
        let manifest = Manifest::new(
            descriptor(media_type::OCI_CONFIG, &config),
            vec![
                descriptor(media_type::OCI_LAYER_GZIP, &gzip),
                descriptor(media_type::OCI_LAYER_ZSTD, &zstd),
            ],
        );
        Self {
            platform: platform.into(),
            manifest: manifest.to_bytes(),
            config,
            layers: vec![gzip, zstd],
            tar,
        }
    }

    /// Of the manifest.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    /// The manifest's entry in an index.
    #[allow(clippy::unwrap_used, reason = "a fixture in memory")]
    pub fn descriptor(&self) -> Descriptor {
        let size = self.manifest.len() as u64;
        let mut entry = Descriptor::new(media_type::OCI_MANIFEST, self.digest(), size);
        entry.platform = Some(self.platform.parse().unwrap());
        entry
    }

    /// Manifest, configuration and layers.
    pub fn blobs(&self) -> Vec<Vec<u8>> {
        let mut blobs = vec![self.manifest.clone(), self.config.clone()];
        blobs.extend(self.layers.iter().cloned());
        blobs
    }

    /// Puts every blob into `blobs`.
    #[allow(clippy::unwrap_used, reason = "a fixture in memory")]
    pub fn store(&self, blobs: &dyn BlobWrite) {
        for bytes in self.blobs() {
            blobs.write(None, &mut bytes.as_slice()).unwrap();
        }
    }
}
