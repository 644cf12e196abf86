use super::*;

fn config(nodes: u32, regions: u32, faults: &str, seconds: u64) -> Config {
    Config {
        nodes,
        regions,
        faults: Fault::list(faults).unwrap(),
        time: Some(Duration::from_secs(seconds)),
        ..Config::default()
    }
}

fn passes(config: &Config) -> Report {
    let outcome = run(config).unwrap();
    assert!(outcome.violations.is_empty(), "{:#?}\n{:#?}", outcome.violations, outcome.report);
    outcome.report
}

fn heals(config: &Config) -> Report {
    let report = passes(config);
    assert_eq!(report.false_downs, 0, "{report:#?}");
    assert!(report.convergence_after_heal_s.is_some_and(|took| took <= 30.0), "{report:#?}");
    report
}

#[test]
fn the_same_seed_has_the_same_outcome() {
    let config = config(16, 2, "crash", 20);
    let [one, two] = [(); 2].map(|()| run(&config).unwrap());
    assert_eq!(one.report, two.report);
    assert_ne!(one.report, run(&Config { seed: 2, ..config }).unwrap().report);
}

#[test]
fn large_meshes_are_simulated_as_long_as_there_is_something_to_see() {
    let lasts = |nodes, faults| {
        let config = Config { time: None, ..config(nodes, 10, faults, 0) };
        config.duration().as_secs()
    };
    assert_eq!([lasts(LARGE, "none"), lasts(LARGE, "crash")], [90, 90]);
    assert_eq!([lasts(LARGE + 1, "none"), lasts(LARGE + 1, "join")], [13, 13]);
    assert_eq!([lasts(10_000, "crash"), lasts(10_000, "join,partition")], [30, 30]);
}

#[test]
fn the_outcome_is_the_same_on_however_many_cores() {
    let config = config(80, 2, "join", 15);
    let [one, four] = [1, 4].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(&config).unwrap().report)
    });
    assert_eq!(one, four);
    assert!(one.load_age_p99_ms.is_some() && one.digest_age_p99_ms.is_some(), "{one:#?}");
}

#[test]
fn what_cannot_be_simulated_is_refused() {
    for wrong in [config(1, 1, "none", 60), config(10, 11, "none", 60), config(10, 1, "none", 1)] {
        assert!(run(&wrong).is_err());
    }
    assert!(run(&Config { loss: 0.6, ..Config::default() }).is_err());
}

#[test]
fn a_mesh_at_rest_has_fresh_figures_and_no_false_downs() {
    let report = passes(&config(30, 1, "none", 30));
    assert_eq!((report.false_downs, report.panics), (0, 0));
    assert!(report.load_age_p99_ms.unwrap() <= 250.0, "{report:#?}");
    assert!(report.convergence_after_join_s.unwrap() < 10.0, "{report:#?}");
}

#[test]
fn regions_know_of_each_other_by_digests() {
    let report = passes(&config(24, 3, "none", 30));
    assert!(report.digest_age_p99_ms.unwrap() <= 600.0, "{report:#?}");
}

#[test]
fn a_death_is_noticed_by_everybody() {
    let report = passes(&config(30, 1, "crash", 45));
    assert!(report.detect_p99_s.unwrap() <= 7.0, "{report:#?}");
    assert_eq!(report.undetected, 0);
}

#[test]
fn two_percent_of_loss_make_nobody_look_dead() {
    assert_eq!(passes(&config(24, 1, "loss=2", 40)).false_downs, 0);
}

#[test]
fn nodes_that_are_not_heard_by_some_are_alive_to_all() {
    heals(&config(20, 1, "asymmetric", 60));
}

#[test]
fn a_flapping_node_is_a_member_again() {
    heals(&config(20, 1, "flap", 60));
}

#[test]
fn a_node_that_stopped_is_a_member_again() {
    heals(&config(20, 1, "pause", 60));
}

#[test]
fn a_restarted_node_is_a_member_again() {
    heals(&config(20, 1, "restart", 60));
}

#[test]
fn a_node_whose_epoch_went_back_is_a_member_again() {
    heals(&config(20, 1, "restart-older", 60));
}

#[test]
fn of_two_processes_of_one_name_the_earlier_stops() {
    let report = heals(&config(20, 1, "duplicate", 60));
    assert_eq!(report.superseded, 1, "{report:#?}");
}

#[test]
fn a_clock_that_jumps_hurts_nobody() {
    heals(&config(20, 1, "clock-jump", 60));
}

#[test]
fn a_partition_heals() {
    heals(&config(24, 3, "partition", 75));
}

#[test]
fn liars_are_found_out_and_nobody_else() {
    let report = passes(&config(24, 2, "byzantine", 45));
    assert!(report.quarantines > 10, "{report:#?}");
    assert_eq!((report.false_quarantines, report.false_downs), (0, 0), "{report:#?}");
    assert!(report.digest_error_p99_percent.unwrap() < 10.0, "{report:#?}");
}

#[test]
fn nodes_that_all_start_at_once_find_each_other() {
    passes(&config(30, 1, "join", 30));
}

#[test]
fn a_rolling_restart_loses_nobody() {
    assert_eq!(passes(&config(16, 1, "rolling", 75)).permanent_false_downs, 0);
}
