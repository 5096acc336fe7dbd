//! Files that say who one machine is. An image, which many machines run, holds them empty;
//! each instance is shown its own, made when it starts.

/// Which of them it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Identity {
    /// machine-id(5): an empty file means that it is yet to be made.
    MachineId,
    SshEd25519,
    SshEd25519Public,
    SshEcdsa,
    SshEcdsaPublic,
    /// sshd does without it where it has another key, as every client of today knows one.
    SshRsa,
    SshRsaPublic,
    /// Of Debian's ssl-cert: what TLS servers are configured with until they have a real one.
    SnakeoilKey,
    SnakeoilCertificate,
}

/// Where they are, relative to the root.
pub const PLACES: [(&str, Identity); 9] = [
    ("etc/machine-id", Identity::MachineId),
    ("etc/ssh/ssh_host_ed25519_key", Identity::SshEd25519),
    (
        "etc/ssh/ssh_host_ed25519_key.pub",
        Identity::SshEd25519Public,
    ),
    ("etc/ssh/ssh_host_ecdsa_key", Identity::SshEcdsa),
    ("etc/ssh/ssh_host_ecdsa_key.pub", Identity::SshEcdsaPublic),
    ("etc/ssh/ssh_host_rsa_key", Identity::SshRsa),
    ("etc/ssh/ssh_host_rsa_key.pub", Identity::SshRsaPublic),
    (
        "etc/ssl/private/ssl-cert-snakeoil.key",
        Identity::SnakeoilKey,
    ),
    (
        "etc/ssl/certs/ssl-cert-snakeoil.pem",
        Identity::SnakeoilCertificate,
    ),
];

/// What the file at this path, relative to the root, says of a machine.
pub fn at(path: &[u8]) -> Option<Identity> {
    let place = PLACES.iter().find(|(known, _)| known.as_bytes() == path);
    place.map(|(_, identity)| *identity)
}
