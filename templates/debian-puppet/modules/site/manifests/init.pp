# A web server with one page. Its greeting is a fact, its heading is in Hiera.
class site (
  String $heading,
  String $package = 'nginx-light',
  String $greeting = $facts['greeting'],
) {
  package { $package:
    ensure          => installed,
    install_options => ['--no-install-recommends'],
  }

  file { '/var/www/html/index.html':
    ensure  => file,
    mode    => '0644',
    content => epp('site/index.html.epp', { 'heading' => $heading, 'greeting' => $greeting }),
    require => Package[$package],
  }

  file { '/var/www/html/index.nginx-debian.html':
    ensure  => absent,
    require => Package[$package],
  }

  service { 'nginx':
    ensure  => running,
    enable  => true,
    require => Package[$package],
  }
}
