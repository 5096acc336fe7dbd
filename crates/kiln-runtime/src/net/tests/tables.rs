//! Tables of rules: kiln's own, and those of others that stand in its way.

use super::*;

/// Runs a Debian program that only tests use; `None` (told) where it is missing.
fn program(name: &str, args: &[&str]) -> Option<String> {
    match std::process::Command::new(name).args(args).output() {
        Ok(output) => {
            let error = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{name} {args:?}: {error}");
            Some(String::from_utf8(output.stdout).unwrap())
        }
        Err(e) => {
            assert!(
                std::env::var_os("KILN_TEST_STRICT").is_none(),
                "{name}: {e}"
            );
            eprintln!("SKIPPED: needs {name}: {e}");
            None
        }
    }
}

#[test]
fn a_root_without_bridges_loses_its_table() {
    on_a_host("stale", |_| {
        let here = network("kn0a1b2c000001", "10.201.0.0/20", false);
        let gone = network("kn0a1b2d000001", "10.202.0.0/20", false);
        for (tag, net) in [("kiln-0a1b2c", &here), ("kiln-0a1b2d", &gone)] {
            ensure_bridge(net).unwrap();
            let mut table = firewall(&[net], 4444);
            table.table = tag.into();
            table.apply().unwrap();
        }
        assert_eq!(remove_stale_tables().unwrap(), Vec::<String>::new());
        remove_bridge(&gone.bridge).unwrap();
        assert_eq!(remove_stale_tables().unwrap(), ["kiln-0a1b2d"]);
        assert_eq!(remove_stale_tables().unwrap(), Vec::<String>::new());
    });
}

#[test]
fn the_table_is_replaced_as_a_whole_and_its_loss_is_seen() {
    on_a_host("table", |_| {
        // The firewall does not need the bridges to exist.
        let many: Vec<BridgeNetwork> = (0..200)
            .map(|n| {
                network(
                    &format!("knt{n}"),
                    &format!("10.{}.{}.0/24", 201 + n / 100, n % 100),
                    n % 2 == 0,
                )
            })
            .collect();
        let all = firewall(&many.iter().collect::<Vec<_>>(), 4444);
        assert!(!all.is_in_place().unwrap());
        all.apply().unwrap();
        assert!(all.is_in_place().unwrap());
        let one = firewall(&[&many[0]], 4445);
        assert!(!one.is_in_place().unwrap());
        one.apply().unwrap();
        assert!(one.is_in_place().unwrap() && !all.is_in_place().unwrap());
        if let Some(listing) = program("nft", &["list", "table", "ip", &one.table]) {
            assert!(
                !listing.contains("4444") && !listing.contains("knt1\""),
                "{listing}"
            );
            assert!(listing.contains("made by kiln"), "{listing}");
            program("nft", &["flush", "ruleset"]).unwrap();
            assert!(!one.is_in_place().unwrap());
        }
        one.remove().unwrap();
        one.remove().unwrap();
        let none = firewall(&[], 4444);
        none.apply().unwrap();
        assert!(none.is_in_place().unwrap() && !one.is_in_place().unwrap());
        let named = Firewall {
            table: "a b".into(),
            ..none
        };
        assert!(matches!(
            named.apply(),
            Err(FirewallError::TableName { .. })
        ));
    });
}

#[test]
fn the_rules_read_in_nfts_language_as_described() {
    on_a_host("rules", |_| {
        let (a, b) = (
            network("knta", "10.201.0.0/20", false),
            network("kntb", "10.201.16.0/20", true),
        );
        let made = firewall(&[&a, &b], 4444);
        made.apply().unwrap();
        if let Some(listing) = program("nft", &["list", "table", "ip", &made.table]) {
            let expected = include_str!("../rules.expected");
            let plain = |text: &str| -> Vec<String> {
                let lines = text.lines().map(|l| l.trim().to_owned());
                lines.filter(|l| !l.starts_with("comment")).collect()
            };
            assert_eq!(plain(&listing), plain(expected), "{listing}");
        }
    });
}

#[test]
fn a_dropping_policy_of_another_firewall_is_told_until_it_excepts_us() {
    for variant in ["iptables-nft", "iptables-legacy"] {
        on_a_host(variant, |_| {
            if program(variant, &["--version"]).is_none() {
                return;
            }
            assert_eq!(forward_policy_conflict(), None);
            let _ = program(variant, &["-A", "FORWARD", "-i", "eth9", "-j", "ACCEPT"]);
            assert_eq!(forward_policy_conflict(), None);
            let _ = program(variant, &["-P", "FORWARD", "DROP"]);
            let told = forward_policy_conflict().expect(variant);
            assert!(
                told.contains("FORWARD") && told.contains("filter"),
                "{told}"
            );
            assert_eq!(input_policy_conflict(), None);
            let _ = program(variant, &["-I", "FORWARD", "-i", "kn+", "-j", "ACCEPT"]);
            assert_eq!(forward_policy_conflict(), None);
        });
    }
}
