//! TLS with rustls and ring, trusting the system's certificates.

use std::sync::Arc;

use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use rustls_platform_verifier::Verifier;

use super::ClientError;

/// The set-up, and why the system's certificates are not there, if they are not: a
/// machine without any can still use a registry of its own.
pub(super) fn config(
    extra_roots: &[Vec<u8>],
) -> Result<(ClientConfig, Option<String>), ClientError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots: Vec<CertificateDer<'static>> = Vec::new();
    for pem in extra_roots {
        for certificate in CertificateDer::pem_slice_iter(pem) {
            roots.push(certificate.map_err(|e| ClientError::Root(e.to_string()))?);
        }
    }
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| ClientError::Http(e.to_string()))?;
    let (mut config, no_roots) = match Verifier::new_with_extra_roots(roots, provider) {
        Ok(verifier) => {
            let verifier: Arc<dyn ServerCertVerifier> = Arc::new(verifier);
            let dangerous = builder.dangerous();
            let config = dangerous.with_custom_certificate_verifier(verifier);
            (config.with_no_client_auth(), None)
        }
        Err(error) => {
            let config = builder.with_root_certificates(RootCertStore::empty());
            (config.with_no_client_auth(), Some(error.to_string()))
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok((config, no_roots))
}
